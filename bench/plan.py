"""python -m bench.plan experiment=NAME: the cells of a grid, what is skipped, hours, memory and disk, before anything runs.

Each cell's model is built from its shape alone and its method applied to that, so that FLOPs, activations and parameters
are counted, not guessed; that takes about a second, or a few where the blocks are not alike (`bench/depth.py`). Where a cell
exceeds the GPU's memory, the plan says with which switches it fits. Seconds of a run are FLOPs / rate: the rate is measured
here in a few seconds, or is a share of the named GPU's peak (`--gpu`, `--share`), which is an assumption.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from bench.config import CONF, Config, to_config
from bench.estimate import CHARACTERS, ROW_BYTES, TOKENS, Cost, cost
from bench.machine import GPUS, SHARE, around, calibrate, gpu_rate, own_memory

SWITCHES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"offload": "activations"},
    {"gradient_checkpointing": True, "offload": "activations"},
)  # for less memory; checkpointing first, whose cost in FLOPs is counted


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
    args = parser.parse_intermixed_args()
    from tqdm import tqdm

    found = plan(args.overrides, GPUS[args.gpu][2] * 2**30 if args.gpu else own_memory(), workers())
    lines = list(tqdm(found, "counting", unit=" lines", leave=False, disable=None))
    rates = {p: gpu_rate(args.gpu, p, args.share) if args.gpu else calibrate() for p in {x.precision for x in lines}}
    print(table(lines, rates, None if args.gpu else around()))
    print(explain(args.gpu, args.share, rates))
    return 0


def workers() -> int:
    """Processes that count: one per core, and at most 8, each of which has its own torch in memory."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def plan(overrides: list[str], memory: int | None = None, processes: int = 1) -> Iterator[Line]:
    """A line for each method, model and task of the grid that `python -m bench -m OVERRIDES` would run.

    memory: bytes of the GPU that it would run on; None: a CPU. processes: that count, at most; for more than one
    the main module must be one that can be imported.
    """
    found = list(cells(overrides))
    alike: dict[str, list[Config]] = {}  # what one has counted helps the next
    for config, _, _ in found:
        alike.setdefault(_kind(config), []).append(config)
    with _counting(alike, memory, min(processes, len(alike) // 4)) as costs:
        for config, runs, trainings in found:
            c = config.choices
            yield Line(
                c["method"], c["model"], c["task"], runs, trainings, next(costs[_kind(config)]), config.train.precision
            )


def _kind(config: Config) -> str:
    return repr((config.method, config.model))


@contextmanager
def _counting(
    alike: dict[str, list[Config]], memory: int | None, processes: int
) -> Iterator[dict[str, Iterator[Cost]]]:
    """The costs of each list of configurations: counted here one by one, or by processes of their own."""
    if processes < 2:
        yield {kind: (_cost_of(c, memory) for c in configs) for kind, configs in alike.items()}
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = {kind: pool.submit(_costs_of, configs, memory) for kind, configs in alike.items()}
        yield {kind: (cost for costs in [jobs[kind]] for cost in costs.result()) for kind in alike}


def _costs_of(configs: list[Config], memory: int | None) -> list[Cost]:
    return [_cost_of(config, memory) for config in configs]


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


def _cost_of(config: Config, memory: int | None) -> Cost:
    from bench.shapes import UnknownShape
    from methods.base import Unsupported

    try:
        found = cost(config, gpu=memory is not None)
        return found if memory is None or found.memory <= memory else replace(found, advice=advice(config, memory))
    except Unsupported as error:
        return Cost(note=f"skipped: {error}")
    except UnknownShape as error:
        return Cost(note=f"unknown: {error}")


def advice(config: Config, memory: int) -> str:
    """For a run that exceeds these bytes of a GPU: the first of `SWITCHES` with which it fits, or that none of them does."""
    least = None
    for switches in SWITCHES:
        found = cost(replace(config, train=replace(config.train, **switches)), gpu=True).memory
        least = min(least or found, found)
        if found <= memory:
            said = " ".join(f"train.{k}={str(v).lower()}" for k, v in switches.items())
            return f"out of memory; fits with {said} ({found / 2**30:.2f} GiB)"
    return f"out of memory, also with checkpointing and offload ({(least or 0) / 2**30:.2f} GiB at least)"


def table(
    lines: list[Line],
    rates: dict[str, float],
    beside: tuple[float, float] | None = None,
) -> str:
    """One aligned line per method, model and task, and their sum.

    beside: what `around` returns; nothing by default.
    """
    from bench.table import aligned

    rows = [("method", "model", "task", "runs", "steps", "trained", "hours", "memory GiB", "disk MiB", "")]
    start, each = beside or (0.0, 0.0)
    hours, disk = start / 3600, 0.0
    for x in lines:
        h, c = (x.cost.flops * x.trainings / rates[x.precision] + each * x.runs) / 3600, x.cost
        hours, disk = hours + h, disk + c.disk * x.runs / 2**20
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
        rows.append((x.method, x.model, x.task, str(x.runs), *numbers, c.note or c.advice))
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
        f"memory, in a step on the longest rows: on a GPU the most bytes that live at once (CUDA itself, its allocator and "
        f"scoring come on top), on a CPU weights + gradients + optimizer + activations, as records have it; disk = stored parameters "
        f"+ {ROW_BYTES} bytes per prediction. Tokens per row: characters / {CHARACTERS:g} of rows at hand, else {TOKENS}; "
        f"generated: as many as a task allows."
    )


if __name__ == "__main__":
    sys.exit(main())
