"""python -m bench.plan experiment=NAME: the cells of a grid, what is skipped, hours, memory and disk, before anything runs.

Each cell's model is built from its shape alone and its method applied to that, so that FLOPs, activations and parameters
are counted, not guessed. Seconds are FLOPs / rate: the rate is measured here in a few seconds, or is a share of the named
GPU's peak (`--gpu`, `--share`), which is an assumption.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.config import CONF, Config, to_config
from bench.estimate import CHARACTERS, ROW_BYTES, TOKENS, Cost, cost

# dense peaks in FLOP/s of the makers' data sheets, and GiB: fp32 on CUDA cores, bf16 (T4: fp16) on tensor cores
GPUS = {
    "t4": (8.1e12, 65e12, 15),
    "rtx4090": (82.6e12, 165.2e12, 24),
    "a100": (19.5e12, 312e12, 80),
    "h100": (66.9e12, 989.4e12, 80),
}
SHARE = 0.3  # of a GPU's peak that training reaches


@dataclass(frozen=True)
class Line:
    """The runs of one method, model and task: their cost, how many there are, and how many full trainings they amount to."""

    method: str
    model: str
    task: str
    runs: int
    trainings: float
    cost: Cost
    precision: str


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="what `python -m bench` would be given")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="plan for this GPU, not for this machine")
    parser.add_argument(
        "--share", type=float, default=SHARE, help="of its peak that training reaches (default %(default)s)"
    )
    args = parser.parse_args()
    lines = list(plan(args.overrides))
    rates = {p: gpu_rate(args.gpu, p, args.share) if args.gpu else calibrate() for p in {x.precision for x in lines}}
    print(table(lines, rates, GPUS[args.gpu][2] if args.gpu else None, None if args.gpu else around()))
    print(explain(args.gpu, args.share, rates))
    return 0


def plan(overrides: list[str]) -> Iterator[Line]:
    """A line for each method, model and task of the grid that `python -m bench -m OVERRIDES` would run."""
    for config, runs, trainings in cells(overrides):
        c = config.choices
        cost = _cost_of(config)
        yield Line(c["method"], c["model"], c["task"], runs, trainings, cost, config.train.precision)


def cells(overrides: list[str]) -> Iterator[tuple[Config, int, float]]:
    """The distinct configurations but for their seeds; how many runs each stands for, and as how many full trainings."""
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    import methods  # noqa: F401  (registers the groups)

    parser = OverridesParser.create()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        fixed = [
            text
            for text, o in zip(overrides, parser.parse_overrides(overrides), strict=True)
            if not o.is_sweep_override()
        ]
        sweeper = hydra.compose("config", overrides=fixed, return_hydra_config=True).hydra.sweeper
        every = [*(f"{k}={v}" for k, v in (sweeper.params or {}).items()), *overrides]
        jobs = BasicSweeper.split_arguments(parser.parse_overrides(every), None)[0]
        seeds: dict[tuple[str, ...], int] = {}
        for job in jobs:
            key = tuple(o for o in job if not o.startswith("seed="))
            seeds[key] = seeds.get(key, 0) + 1
        for job_key, count in seeds.items():
            cfg = hydra.compose("config", overrides=list(job_key), return_hydra_config=True)
            choices = cfg.hydra.runtime.choices
            del_key(cfg, "hydra")
            yield to_config(cfg, choices), *_tuned(sweeper, count)


def del_key(cfg: Any, key: str) -> None:
    """Remove a key from a closed config."""
    from omegaconf import open_dict

    with open_dict(cfg):
        del cfg[key]


def _tuned(sweeper: Any, count: int) -> tuple[int, float]:
    """Runs and full trainings: of a grid its cells; of a tuning experiment the trials of all rungs and the tested seeds."""
    if "trials" not in sweeper:
        return count, float(count)
    sizes = [max(1, sweeper.trials // sweeper.factor**rung) for rung in range(sweeper.rungs)]
    shares = [sweeper.factor ** (rung + 1 - sweeper.rungs) for rung in range(sweeper.rungs)]
    final = len(sweeper.final_seeds)
    return sum(sizes) + final, sum(n * s for n, s in zip(sizes, shares, strict=True)) + final


def _cost_of(config: Config) -> Cost:
    from bench.shapes import UnknownShape
    from methods.base import Unsupported

    try:
        return cost(config)
    except Unsupported as error:
        return Cost(note=f"skipped: {error}")
    except UnknownShape as error:
        return Cost(note=f"unknown: {error}")


def gpu_rate(gpu: str, precision: str, share: float) -> float:
    """FLOP/s of a GPU: a share of its peak in the precision of the matrix products."""
    return GPUS[gpu][precision != "fp32"] * share


@cache
def calibrate(seconds: float = 2.0) -> float:
    """FLOP/s of training steps on this machine: a BERT of 2 x 384, batches of 8 x 64, random weights."""
    import torch
    import transformers

    from bench import measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = dict(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536, vocab_size=1000)
    with torch.random.fork_rng():
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).to(device).eval()  # type: ignore[arg-type]
    batch = {"input_ids": torch.ones(8, 64, dtype=torch.long), "labels": torch.zeros(8, dtype=torch.long)}
    batch = {k: v.to(device) for k, v in batch.items()}
    work = measure.probe(model, batch, lambda b: model(**b).loss)["train_step"]
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        model(**batch).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return work / sorted(times)[len(times) // 2]


@cache
def around() -> tuple[float, float]:
    """Seconds that a command takes on this machine before its first run, and each of its runs beside its FLOPs.

    Those of a real command with three runs of five steps of a tiny model. Raises RuntimeError where it fails.
    """
    tiny = ["method=lora", "model=random_bert", "task=rte", "data=standin", "wandb=off", "train.steps=5"]
    limits = [f"task.limit.{split}=32" for split in ("train", "val", "test")]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench", "-m", *tiny, *limits, "seed=0,1,2", f"results={folder}"]
        begun = time.time()
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        ends = sorted(record.stat().st_mtime for record in Path(folder).glob("*/record.json"))
    if done.returncode:
        raise RuntimeError(f"the command that is timed has failed: {done.stdout}{done.stderr}")
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    return ends[0] - begun - each, each


def table(
    lines: list[Line],
    rates: dict[str, float],
    limit: float | None = None,
    beside: tuple[float, float] | None = None,
) -> str:
    """One aligned line per method, model and task, and their sum.

    limit: GiB of the device, to mark what exceeds it. beside: what `around` returns; nothing by default.
    """
    from bench.table import aligned

    rows = [("method", "model", "task", "runs", "steps", "trained", "hours", "memory GiB", "disk MiB", "")]
    start, each = beside or (0.0, 0.0)
    hours, disk = start / 3600, 0.0
    for x in lines:
        h, c = (x.cost.flops * x.trainings / rates[x.precision] + each * x.runs) / 3600, x.cost
        hours, disk = hours + h, disk + c.disk * x.runs / 2**20
        note = c.note or ("out of memory?" if limit and c.memory / 2**30 > limit else "")
        numbers = (
            ("-",) * 5
            if c.note
            else (
                f"{c.steps:,}",
                f"{c.trained:,}",
                f"{h:.2f}",
                f"{c.memory / 2**30:.2f}",
                f"{c.disk * x.runs / 2**20:.1f}",
            )
        )
        rows.append((x.method, x.model, x.task, str(x.runs), *numbers, note))
    planned = [x for x in lines if not x.cost.note]
    peak = max((x.cost.memory for x in planned), default=0) / 2**30
    said = f"{hours:.2f}" if hours >= 1 else f"{hours:.3g}"
    total = (f"{sum(x.runs for x in planned)}", "", "", said, f"{peak:.2f}", f"{disk:.1f}", "")
    rows.append(("all", "", "", *total))
    return aligned(rows)


def explain(gpu: str | None, share: float, rates: dict[str, float]) -> str:
    """How the numbers were made."""
    said = ", ".join(f"{p} {rate:.3g}" for p, rate in sorted(rates.items()))
    where = f"{share:g} of the peak of one {gpu} (an assumption)" if gpu else "measured on this machine just now"
    beside = (
        "starts and loading not included"
        if gpu
        else "the command's start (in the sum alone), a run's start and its record timed too, fetching not"
    )
    return (
        f"hours = (training + evaluation FLOPs, counted) / FLOP/s; FLOP/s: {said}, {where}; {beside}.\n"
        f"memory = weights + trained x (gradient + 2 moments) + activations of the longest batch; disk = stored parameters "
        f"+ {ROW_BYTES} bytes per prediction. Tokens per row: characters / {CHARACTERS:g} of rows at hand, else {TOKENS}; "
        f"generated: as many as a task allows."
    )


if __name__ == "__main__":
    sys.exit(main())
