"""How the cost of LoRA grows: with tokens, layers, rank, adapted layers, and cells of a sweep; exponents and one figure.

python -m benchmarks.scaling [-o scaling.png] [--rounds 5] [--only rank,cells]

A step is a forward and a backward of a BERT with random weights, 256 wide, 4 layers, 8 rows of 128 tokens, LoRA r8 on query
and value, without dropout; one of these is varied at a time. Seconds are CPU seconds of one thread, which other programs
disturb little, the fastest of `--rounds`; FLOPs, and MiB that autograd keeps for the backward, are counted. Cells are whole
runs of one step on a tiny model in one process, from nothing kept. An exponent is the slope of a straight line through the
logarithms: 1 doubles with its cause, 0 does not depend on it; the second is that of the last two points, past fixed costs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.floor import counted
from methods import METHODS

Rows = dict[str, torch.Tensor]
ROLES = ("query", "query_value", "attention", "all_linear")  # 1, 2, 4, 6 adapted layers in each block
QUANTITIES = {"seconds": "CPU s", "flops": "GFLOPs", "kept": "MiB kept"}


@dataclass
class Curve:
    """What one cause costs: at each of its values, each quantity."""

    cause: str
    values: list[int] = field(default_factory=list)
    costs: dict[str, list[float]] = field(default_factory=dict)

    def add(self, value: int, **costs: float) -> None:
        self.values.append(value)
        for name, cost in costs.items():
            self.costs.setdefault(name, []).append(cost)

    def exponent(self, name: str, last: int | None = None) -> float:
        """Slope in logarithms, of all points or of the last ones."""
        x, y = (np.log(v[-last:] if last else v) for v in (self.values, self.costs[name]))
        return float(np.polyfit(x, y, 1)[0])


def model(layers: int = 4, rank: int = 8, targets: str = "query_value") -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=1024, vocab_size=1000,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=1024,
    )  # fmt: skip
    backbone = transformers.BertForSequenceClassification(config).requires_grad_(False)
    return METHODS["lora"](rank=rank, targets=targets).apply(backbone, iter(())).train()


def batch(tokens: int = 128) -> Rows:
    ids = torch.arange(8 * tokens).reshape(8, tokens) % 997 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 2}


def cost(net: Any, rows: Rows, rounds: int) -> dict[str, float]:
    """A step's quantities."""
    of = counted(net, rows)
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.process_time()
        net(**rows).loss.backward()
        seconds.append(time.process_time() - start)
        net.zero_grad(set_to_none=True)
    return {"seconds": min(seconds[1:]), "flops": of["train_step"] / 1e9, "kept": of["activations"] / 2**20}


def tokens(rounds: int) -> Curve:
    curve = Curve("tokens of a row")
    for n in (32, 64, 128, 256, 512, 1024):
        curve.add(n, **cost(model(), batch(n), rounds))
    return curve


def layers(rounds: int) -> Curve:
    curve = Curve("layers")
    for n in (1, 2, 4, 8, 16):
        curve.add(n, **cost(model(layers=n), batch(), rounds))
    return curve


def rank(rounds: int) -> Curve:
    curve = Curve("rank")
    for n in (1, 4, 16, 64, 256):
        curve.add(n, **cost(model(rank=n), batch(), rounds))
    return curve


def adapters(rounds: int) -> Curve:
    from methods.base import Adapted

    curve = Curve("adapted layers")
    for targets in ROLES:
        net = model(targets=targets)
        curve.add(sum(isinstance(m, Adapted) for m in net.modules()), **cost(net, batch(), rounds))
    return curve


def cells(rounds: int) -> Curve:
    """Seconds of sweeps of so many cells."""
    from bench import rows
    from bench.config import compose
    from bench.run import run
    from benchmarks.sweep import TINY

    def sweep(n: int) -> float:
        rows._kept.clear()
        start = time.process_time()
        for seed in range(n):
            record = run(compose([*TINY, f"seed={seed}", f"results={folder}", "force=true"]))
            assert record.status == "ok", record.traceback
        return time.process_time() - start

    curve = Curve("cells of a sweep")
    with tempfile.TemporaryDirectory() as folder:
        sweep(4)  # imports
        for n in (1, 2, 4, 8, 16, 32):
            curve.add(n, seconds=min(sweep(n) for _ in range(2)))
    return curve


CURVES: dict[str, Callable[[int], Curve]] = {f.__name__: f for f in (tokens, layers, rank, adapters, cells)}


def draw(curves: list[Curve], path: Path) -> None:
    """A panel per cause, each quantity relative to its first value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(3 * len(curves), 3), sharey=True, squeeze=False)
    styles = {"seconds": "o-", "flops": "s--", "kept": "^:"}
    for panel, curve in zip(panels[0], curves, strict=True):
        for name, values in curve.costs.items():
            label = f"{QUANTITIES[name]}: {curve.exponent(name):.2f}"
            panel.plot(curve.values, np.array(values) / values[0], styles[name], markersize=4, label=label)
        panel.set(xscale="log", yscale="log", xlabel=curve.cause)
        panel.set_xticks(curve.values, [str(v) for v in curve.values], minor=False)
        panel.minorticks_off()
        panel.legend(title="exponents", fontsize=7, title_fontsize=7, loc="upper left")
    panels[0][0].set_ylabel("cost over that at the first point")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("scaling.png"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CURVES), help="causes, comma-separated: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves = [CURVES[name](args.rounds) for name in args.only.split(",")]
    for curve in curves:
        print(
            f"{curve.cause:18}"
            + "".join(f"{v:>10}" for v in curve.values)
            + f"{'exponent':>10} {'of the last two':>16}"
        )
        for name, values in curve.costs.items():
            ends = f"{curve.exponent(name):10.2f} {curve.exponent(name, 2):16.2f}"
            print(f"  {QUANTITIES[name]:16}" + "".join(f"{v:10.4g}" for v in values) + ends)
    draw(curves, args.output)
    print(f"drawn to {args.output}")


if __name__ == "__main__":
    main()
