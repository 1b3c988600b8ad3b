"""Epochs on kept features against epochs that run the frozen blocks again, in one process and in turn.

python -m benchmarks.features [--rounds 5] [--rows 256] [--method lst] [--base]

Each line is one method on one random model: seconds of an epoch of training with the scoring of val after it, without
features (`again`), with them (`kept`), the seconds to compute them once (`once`), and the ratios again / kept and
(once + kept) / again, that of the first epoch; medians of `--rounds`, but `once` of one computation, of the test rows too.
`FLOPs` is again / kept in counted FLOPs, what the ratio of seconds would be if a FLOP took the same everywhere: what is
trained is computed in both, so that a method that trains the upper half of the blocks gains no more than their half, and
`lst` no more than its side network leaves. `alone` are the seconds of the side network's own training steps, without model,
reading, head, clipping and scoring: the attention of its narrow heads and its narrow products are slow for their FLOPs. No cache can
give more than again / alone, printed behind it; kept / alone is how near to that it comes. `--base` takes BERT-base's 12 x 768
instead. Goal: 10x where only the head, or a side network, is trained.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch

from bench import features, random_models
from bench.clock import Phases
from bench.config import Config, compose
from bench.flops import flops
from bench.layout import current, running
from bench.prepare import find_device, prepare
from bench.train import Loop, Stop
from methods.ladder import Ladder

GOAL = 10.0
BIG = {
    "bert": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536),
    "llama": dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=4, intermediate_size=1024),
    "vit": dict(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, patch_size=2),
    "t5": dict(d_model=256, d_kv=64, d_ff=1024, num_layers=4, num_heads=4),
}
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
CELLS = (
    ("linear_probe", "bert", "sst2"),
    ("linear_probe", "llama", "sst2"),
    ("linear_probe", "vit", "cifar10"),
    ("linear_probe", "t5", "sst2"),
    ("telly", "bert", "sst2"),
    ("lst", "bert", "sst2"),
    ("lst", "llama", "sst2"),
    ("lst", "vit", "cifar10"),
)
OPTIONS = {
    "telly": ["method.blocks=3"],
    "lst": ["method.start=random"],
}  # how a side network starts costs no epoch more


class Epochs:
    """One prepared run whose epochs are timed one by one."""

    def __init__(self, config: Config, kept: bool):
        self.config, rows, device = config, config.task.load(config.data), find_device(config)
        self.ready = prepare(config, rows, device)
        self.batches, phases = self.ready.train_batches(config), Phases(device)
        steps = self.batches.per_epoch * 100
        self.loop = Loop(self.ready.model, self.ready.method, config.train, steps=steps, device=device)
        self.found = features.use(self.ready, config, phases, Stop()) if kept else None
        self.once = phases.seconds.get("features", 0.0)

    def __call__(self) -> float:
        """Seconds of the next epoch and of scoring val."""
        start = time.perf_counter()
        for _ in range(self.batches.per_epoch):
            self.loop.step(self.batches.micro(self.loop.progress.step, 1))
        self.ready.predict("val", self.config)
        return time.perf_counter() - start


class Alone:
    """The training steps of an epoch of a side network by itself, on what it was given in `kept`."""

    def __init__(self, kept: Epochs, ladder: Any):
        self.ladder, self.optimizer, climb = ladder, kept.loop.optimizer, ladder.climb
        self.given: list[tuple[Any, Any]] = []

        def noting() -> Any:
            if torch.is_grad_enabled():
                self.given.append((ladder.notes, current()))
            return climb()

        ladder.climb = noting
        kept()
        del ladder.climb

    def __call__(self) -> float:
        """Seconds."""
        start = time.perf_counter()
        for notes, layout in self.given:
            self.ladder.notes = [(args, without_cache(kwargs), states) for args, kwargs, states in notes]
            with running(layout):
                loss = self.ladder.climb().square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return time.perf_counter() - start


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a block is given, but for keys and values of an earlier call."""
    return {k: None if k == "past_key_values" else v for k, v in kwargs.items()}


def cell(method: str, model: str, task: str, args: Any) -> dict[str, Any]:
    """The medians of one line. Raises RuntimeError where no features could be kept."""
    limit = f"task.limit={{train: {args.rows}, val: {args.rows // 4}, test: 8}}"
    words = [f"method={method}", f"task={task}", f"model.path=random:{model}", "data=standin", "wandb=off", limit]
    config = compose([*words, *OPTIONS.get(method, [])])
    again, kept = Epochs(config, kept=False), Epochs(config, kept=True)
    if kept.found is None:
        raise RuntimeError(f"{method} {model}: no features were kept")
    ladder = next((m for m in kept.ready.model.modules() if isinstance(m, Ladder)), None)
    alone = (lambda: float("nan")) if ladder is None else Alone(kept, ladder)
    seconds = [(again(), kept(), alone()) for _ in range(args.rounds + 1)][1:]  # the first warms up
    a, k, floor = (statistics.median(column) for column in zip(*seconds, strict=True))
    counted = flops(again) / flops(kept)
    found = dict(again=a, kept=k, alone=floor, once=kept.once, ratio=a / k, first=(kept.once + k) / a, flops=counted)
    states = f"{kept.found['states']} x {kept.found['positions']} positions, {kept.found['bytes'] / 1e6:.1f} MB"
    return dict(cell=f"{method} {model}", **found, kept_states=states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--method", help="its lines alone")
    parser.add_argument("--base", action="store_true", help="BERT of BERT-base's shape")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind, sizes in (BIG | {"bert": BASE} if args.base else BIG).items():
        random_models.RANDOM[kind] |= sizes
    print(
        f"{'':20} {'again s':>8} {'kept s':>8} {'once s':>8} {'again/kept':>10} {'first epoch':>11} {'FLOPs':>9}  kept"
    )
    for words in CELLS if args.method is None else [c for c in CELLS if c[0] == args.method]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PARETUNE_CACHE"] = folder
            line = cell(*words, args)
        seconds = " ".join(f"{line[name]:8.3f}" for name in ("again", "kept", "once"))
        again, kept, least = line["again"], line["kept"], line["alone"]
        alone = f" alone {least:.3f} s, {again / least:.1f}x; kept/alone {kept / least:.2f};" if least > 0 else ""
        values = f"{seconds} {line['ratio']:9.1f}x {line['first']:10.2f}x {line['flops']:8.1f}x"
        goal = f" goal {GOAL:.0f}x {'met' if line['ratio'] >= GOAL else 'missed'}" if words[0] != "telly" else ""
        print(f"{line['cell']:20} {values}  {line['kept_states']};{alone}{goal}", flush=True)


if __name__ == "__main__":
    main()
