"""Seconds before anything is computed: the help, the first training step, one more cell of a sweep, encoding text.

python -m benchmarks.startup [--rounds 5]

Each line is the median of `--rounds` fresh processes, in seconds of wall time and of CPU time: on a busy machine only the
second says something. The run is tiny (BERT of 2 x 32 with random weights, stand-in rows, its text already encoded), so
what is left is start-up; the imports of torch, transformers and datasets, alone in a process, are what no run can avoid.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUN = ["method=lora", "model=random_bert", "task=rte", "data=standin", "wandb=off", "force=true", "train.steps=1"]
SMALL = "task.limit={train: 64, val: 32, test: 32}"
GOALS = {"--help": 1.0, "first training step": 6.0}
IMPORTS = """
import datasets, torch
from transformers import BertForSequenceClassification
torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
"""
FIRST_STEP = """
import os, runpy
from bench import train
def step(loop, parts, inner=train.Loop.step):
    inner(loop, parts)
    os._exit(0)
train.Loop.step = step
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""
ENCODE = """
import random, sys, time
from datasets import Dataset
from bench.encoded import Encoded, encode_splits
from bench.model import build
from bench.config import compose
from tasks import Rows, standin
config = compose(["task=sst2", "model=minilm"])
task, processor = config.task, build(config.model, config.task).processor
draw = random.Random(0)
rows = Dataset.from_list([task.example(draw) | {"row_id": i} for i in range(20_000)])
rows = Rows({"train": rows}, {"fingerprints": {"train": "startup"}})
start = time.process_time()
encoded = Encoded(rows.splits["train"], task, processor) if sys.argv[1] == "alone" else encode_splits(rows, task, processor)["train"]
encoded.length(0)
ready = time.process_time()
for i in range(0, 6400, 32):
    encoded.batch(list(range(i, i + 32)))
print(ready - start, time.process_time() - ready)
"""


def process(command: list[str], cache: str | None = None) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds and output of one process. Raises CalledProcessError."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PARETUNE_CACHE": cache} if cache else {})
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def median(rounds: int, *command: str) -> tuple[float, float]:
    """Median wall and CPU seconds of `rounds` processes, after one that fills the caches."""
    process(list(command))
    found = [process(list(command))[:2] for _ in range(rounds)]
    return statistics.median(w for w, _ in found), statistics.median(c for _, c in found)


def show(name: str, wall: float | None, cpu: float) -> None:
    """One line of the table."""
    shown = "       -" if wall is None else f"{wall:8.2f}"
    print(f"{name:44} {shown} {cpu:8.2f} {GOALS.get(name, ''):>6}", flush=True)


def starting(rounds: int, results: str) -> None:
    """Lines of the command line: help, imports, first step, one cell more."""
    run: list[Any] = [*RUN, SMALL, f"results={results}"]
    show("--help", *median(rounds, "-m", "bench", "--help"))
    show("imports of torch, transformers, datasets", *median(rounds, "-c", IMPORTS))
    show("first training step", *median(rounds, "-c", FIRST_STEP, *run))
    for words, isolate in (("", "false"), (", isolated", "true")):
        one = median(rounds, "-m", "bench", "-m", *run, f"isolate={isolate}", "seed=0")
        five = median(rounds, "-m", "bench", "-m", *run, f"isolate={isolate}", "seed=0,1,2,3,4")
        show(f"a sweep of one cell, whole{words}", *one)
        show(f"one more cell of the sweep{words}", *((b - a) / 4 for a, b in zip(one, five, strict=True)))


def encoding(cache: str) -> None:
    """Lines of 20,000 short reviews for MiniLM: encoded in the process, into the cache, out of the cache."""
    for name, how in (("in memory", "alone"), ("into the cache", "shared"), ("out of the cache", "shared")):
        ready, batches = process(["-c", ENCODE, how], cache)[2].split()[-2:]
        show(f"20,000 rows encoded {name}", None, float(ready))
        show("  200 batches of 32 of them", None, float(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"medians of {rounds} processes, {os.cpu_count()} cores, load {load:.1f} per core")
    print(f"{'':44} {'wall s':>8} {'CPU s':>8} {'goal':>6}")
    with tempfile.TemporaryDirectory() as folder:
        encoding(f"{folder}/cache")
        starting(rounds, f"{folder}/results")


if __name__ == "__main__":
    main()
