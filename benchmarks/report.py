"""Seconds to load a folder of records and to write its report, and the size of the file: a promise of 5 s and 10 MB.

python -m benchmarks.report [--runs 2000] [--rows 500] [--steps 100] [--rounds 3]

Invented records: 40 methods on 10 tasks with 5 seeds for 2,000 runs, each with a learning curve of `--steps` points and
stored predictions of `--rows` test rows. Every round is a process of its own, so that imports count as they do for a user.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from bench.record import Record

METHODS, SEEDS = 40, 5
ENVIRONMENT = {"device": "cpu", "memory": "counted", "software": {"torch": "2.13.0"}, "commit": "abc123"}


def write_runs(folder: Path, runs: int, rows: int, steps: int) -> None:
    """Invented runs, `METHODS` x `SEEDS` per task, whose methods differ by up to 10 points."""
    random = np.random.default_rng(0)
    for number in range(runs):
        seed, method, task = number % SEEDS, number // SEEDS % METHODS, number // (SEEDS * METHODS)
        right = random.random(rows) < 0.7 + 0.1 * method / METHODS
        record = _record(f"method_{method:02}", f"task_{task:02}", seed, float(right.mean()))
        record.id = f"{number:012x}"
        record.history = [{"step": float(s), "loss": 2 / (1 + s) + random.random() / 10} for s in range(steps)]
        record.save(folder)
        label = np.arange(rows) % 2
        table = pd.DataFrame({"row_id": range(rows), "label": label, "prediction": np.where(right, label, 1 - label)})
        table = table.assign(score=random.random(rows), split="test")
        table.to_parquet(folder / record.id / "predictions.parquet", index=False)


def _record(method: str, task: str, seed: int, score: float) -> Record:
    params = 1_000 * (1 + sum(map(ord, method)) % 97)
    values = {"peak": 5e8 + 12 * params, "weights": 5e8, "gradients": 4 * params, "optimizer": 8 * params}
    return Record(
        id="",
        method=method,
        model="encoder",
        task=task,
        seed=seed,
        config={"train": {"lr": 1e-3}, "method": {"rank": 8}, "seed": seed},
        data={"kind": "synthetic", "standin": True, "protocol": "cut", "fingerprints": {"test": task}},
        metric="accuracy",
        score=score,
        metrics={"val/accuracy": score + 0.01, "test/accuracy": score},
        trained_params=params,
        stored_bytes=4 * params,
        total_params=125_000_000,
        memory={k: int(v) for k, v in (values | {"activations": 9e7}).items()},
        time={"setup": 1.0, "train": 60.0 + seed, "eval": 3.0, "step": 0.03 + seed / 1000, "total": 70.0},
        flops={"train_step": int(2e12), "forward": int(7e11)},
        environment=ENVIRONMENT,
    )


def measure(folder: Path) -> tuple[float, int]:
    """Seconds of `python -m analysis report` on the folder, and the bytes of what it wrote."""
    page = folder.parent / "report.html"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "analysis", "report", str(folder), "-o", str(page)], check=True)
    return time.perf_counter() - start, page.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    for name, default in (("runs", 2000), ("rows", 500), ("steps", 100), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "results"
        write_runs(folder, args.runs, args.rows, args.steps)
        found = [measure(folder) for _ in range(args.rounds)]
    seconds = [s for s, _ in found]
    print(
        f"{args.runs} runs: median {statistics.median(seconds):.2f} s of {args.rounds} ({min(seconds):.2f} to {max(seconds):.2f})"
    )
    print(f"{found[0][1] / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
