"""Reading records, means over seeds, fronts, labels and the command line of `analysis`, on synthetic records."""

import itertools
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis.columns import write
from analysis.placement import overlaps, place
from bench.record import Record

METHODS = {"linear_probe": 0, "bitfit": 100_000, "ia3": 60_000, "lora": 300_000, "dora": 320_000, "full": 125_000_000}
SOFTWARE = {"torch": "2.13.0", "transformers": "5.23.0"}


def synthetic(method="lora", task="rte", seed=0, standin=False, lr=1e-3, **changes):
    """A record of invented numbers, drawn from its own arguments."""
    random = np.random.default_rng([len(method), sum(map(ord, method + task)), seed])
    params = METHODS.get(method, 200_000)
    score = 0.6 + 0.03 * math.log10(1 + params) + 0.02 * random.normal()
    peak = int(5e8 + 12 * params + 1e8 * random.random())
    values = dict(
        id=f"{abs(hash((method, task, seed, standin, lr))):016x}"[:12],
        method=method,
        model="roberta_base",
        task=f"{task} (stand-in)" if standin else task,
        seed=seed,
        config={"train": {"lr": lr, "epochs": 3.0}, "method": {"rank": 8, "targets": ["query", "value"]}, "seed": seed},
        data={"kind": "mirror", "path": "glue", "name": task, "revision": "abc", "standin": standin, "protocol": "cut-1",
              "rows": {"train": 2490, "val": 138, "test": 139}, "fingerprints": {"train": "aa", "val": "bb", "test": task}},
        metric="accuracy",
        score=score,
        metrics={"val/accuracy": score + 0.01, "test/accuracy": score, "test/f1": score - 0.05},
        trained_params=params,
        head_params=1538,
        stored_params=params + 1538,
        stored_bytes=4 * (params + 1538),
        total_params=125_000_000,
        memory={"weights": 500_000_000, "activations": 90_000_000, "peak": peak},
        time={"setup": 1.0, "train": 60.0, "step": 0.03 + 0.01 * random.random(), "total": 70.0},
        flops={"train_step": int(2e12), "forward": int(7e11), "total_train": int(2e15)},
        history=[{"step": float(s), "loss": 1 / (1 + s), "val": score} for s in range(10)],
        environment={"device": "cpu", "memory": "counted", "software": SOFTWARE, "commit": "abc123"},
    )  # fmt: skip
    return Record(**values | changes)


def write_grid(folder, tasks=("rte", "stsb"), seeds=3, methods=METHODS):
    for method, task, seed in itertools.product(methods, tasks, range(seeds)):
        synthetic(method, task, seed).save(folder)
    return folder


@pytest.fixture
def results(tmp_path):
    return write_grid(tmp_path / "results")


def frame(*records):
    """The table of a few records, through files."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        for i, record in enumerate(records):
            record.id = f"{i:012x}"
            record.save(Path(folder))
        return analysis.load(folder)
