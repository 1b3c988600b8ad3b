"""All benchmarks in a quick form, and their numbers against the goals in one table: python -m benchmarks [NAME ...]

Each runs in a process of its own, by a command that is shown; without its options that command takes longer and measures
better. On a busy machine a missed goal says little where the number is a ratio of seconds, and much where it is counted.
The exit code is 1 where a benchmark fails or gives no number, not where a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = r"([+-]?[\d.]+)"


@dataclass(frozen=True)
class Goal:
    """One number of a benchmark: what it is, where its output says it, and the least (">= 3") or the most it may be."""

    what: str
    found: str
    goal: str

    def met(self, value: float) -> bool:
        sign, bound = self.goal.split()
        return value >= float(bound) if sign == ">=" else value <= float(bound)


PEFT = ("lora", "dora", "ia3", "ln_tuning")
BENCHMARKS: dict[str, tuple[str, list[Goal]]] = {  # module: its options here, its goals
    "methods": (
        f"--methods {','.join(PEFT)} --rounds 3 --steps 3",
        [
            Goal("lora: bytes kept for the backward, over the floor", rf"^lora .* {NUMBER} +\S+$", "<= 1.05"),
            *(Goal(f"{name}: bytes kept, over peft's", rf"^{name} .* {NUMBER}$", "<= 1.05") for name in PEFT),
            *(Goal(f"{name}: seconds of a step, over peft's", rf"^{name} +peft \S+ +\S+ +{NUMBER}", "<= 1.05") for name in PEFT),
        ],
    ),
    "memory": (
        "--methods lora --memory 24",
        [Goal("lora: billions of parameters in 24 GiB (peft: 6.47)", rf"^lora +{NUMBER}", ">= 6.47")],
    ),
    "startup": (
        "--rounds 1",
        [
            Goal("--help, CPU s", rf"^--help +\S+ +{NUMBER}", "<= 1"),
            Goal("first training step, CPU s", rf"^first training step +\S+ +{NUMBER}", "<= 6"),
        ],
    ),
    "sweep": (
        "--cells 200 --times 10",
        [
            Goal("claim, record and W&B of a run, ms", rf"^sum .* median +{NUMBER}", "<= 150"),
            Goal("growth in 180 cells, MiB", rf"cells: {NUMBER} MiB", "<= 10"),
        ],
    ),
    "features": (
        "--rounds 3 --rows 128",
        [
            Goal(f"{method}: an epoch over one on kept features", rf"^{method} bert(?: +[\d.]+){{3}} +{NUMBER}x", ">= 10")
            for method in ("linear_probe", "lst")
        ]
        + [Goal("lst: kept features over the side network's steps", rf"^lst bert .* kept/alone {NUMBER}", "<= 1.5")],
    ),
    "training": (
        "--rows 2000 --rounds 1",
        [Goal("whole run on short text, Trainer over ours", rf"^Trainer / ours: median {NUMBER}", ">= 2.5")],
    ),
    "fused": (
        "--shapes 128x2 --rounds 1",
        [Goal("eight small runs, Trainer over fused", rf"^128x2: .* Trainer / fused: median {NUMBER}", ">= 2")],
    ),
    "generation": (
        "--rows 32 --steps 20 --rounds 1",
        [Goal("GSM8K answers, generate over ours", rf"^generate / ours: median {NUMBER}", ">= 3")],
    ),
    "spectra": (
        "--kinds 'rank 8' --sides full,fast --rounds 1",
        [Goal("spectra of RoBERTa-base, full SVDs over ours", rf"^RoBERTa-base, .* x full {NUMBER}", ">= 20")],
    ),
    "report": (
        "--rounds 1",
        [Goal("report of 2,000 runs, s", rf"median {NUMBER} s", "<= 5"), Goal("its size, MB", rf"^{NUMBER} MB", "<= 10")],
    ),
}  # fmt: skip


@dataclass
class Line:
    """One row of the table."""

    name: str
    goal: Goal
    value: float | None

    def __str__(self) -> str:
        shown = "no number" if self.value is None else f"{self.value:.6g}"
        verdict = "" if self.value is None else "met" if self.goal.met(self.value) else "MISSED"
        return f"{self.goal.what:52} {shown:>10} {self.goal.goal:>8}  {verdict:6}  {self.name}"


def output(command: str) -> str:
    """What a benchmark prints, which is shown as it comes. Its errors go to the screen alone."""
    arguments = [sys.executable, "-m", *shlex.split(command)]
    text = []
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(f"    {line}", end="", flush=True)
            text.append(line)
    return "".join(text)


def lines(name: str) -> Iterator[Line]:
    """Run one benchmark and read its numbers."""
    options, goals = BENCHMARKS[name]
    command = f"benchmarks.{name} {options}"
    print(f"python -m {command}", flush=True)
    start = time.perf_counter()
    text = output(command)
    print(f"    {time.perf_counter() - start:.0f} s", flush=True)
    for goal in goals:
        match = re.search(goal.found, text, re.MULTILINE)
        yield Line(name, goal, float(match[1]) if match else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    start = time.perf_counter()
    table = [line for name in names for line in lines(name)]
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"\n{time.perf_counter() - start:.0f} s, {os.cpu_count()} cores, load {load:.1f} per core at the end")
    print(f"{'':52} {'':>10} {'goal':>8}")
    print(*table, sep="\n")
    return int(any(line.value is None for line in table))


if __name__ == "__main__":
    sys.exit(main())
