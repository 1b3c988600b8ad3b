"""One run on two processes of torchrun (gloo, on a CPU) is the run of one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from bench.config import compose
from bench.record import Record
from bench.run import run

ROOT = Path(__file__).parents[1]
# 41 rows in batches of 8: the last batch of an epoch has one row, of which the second process has none
CELL = ["model=random_llama", "task=rte", "data=standin", "task.limit={train:41,val:15,test:15}", "wandb=off"]
CELL += ["train.steps=8", "train.batch_size=8", "train.accumulate=2", "train.eval_every=4", "task.max_length=48"]
METHODS = ("lora", "adalora", "galore", "mezo", "lisa")


def torchrun(results, *overrides):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "bench",
        "-m",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*launcher, *CELL, f"results={results}", *overrides], cwd=ROOT, env=environment, **options)


def records(results):
    return [Record.load(p) for p in sorted(Path(results).glob("*/record.json"))]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a sweep by two processes, and its output."""
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(folder, f"method={','.join(METHODS)},increlora")
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 1, output  # increlora
    return folder, output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, two):
    """(record of one process, record of two) of each method."""
    folder = tmp_path_factory.mktemp("one")
    alone = [run(compose([*CELL, f"method={m}", f"results={folder}"])) for m in METHODS]
    return [(a, Record.load(two[0] / a.id)) for a in alone]


def test_two_processes_compute_the_numbers_of_one(pairs, two):
    for a, b in pairs:
        assert (a.status, b.status) == ("ok", "ok"), b.traceback
        assert b.score == a.score and b.selected_step == a.selected_step, a.method
        losses = [[h["train/loss"] for h in r.history if "train/loss" in h] for r in (a, b)]
        assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], abs=1e-6), a.method
        tables = [pd.read_parquet(Path(a.config["results"]) / a.id / "predictions.parquet")]
        tables.append(pd.read_parquet(two[0] / a.id / "predictions.parquet"))
        assert tables[0]["row_id"].tolist() == tables[1]["row_id"].tolist()
        assert tables[1]["score"].tolist() == pytest.approx(tables[0]["score"].tolist(), abs=1e-4)


def test_its_costs_are_marked_as_those_of_two_devices(pairs):
    for a, b in pairs:
        assert a.environment["device"] == "cpu" and b.environment["device"] == "2 x cpu"
        assert b.environment["devices"] == 2 and b.memory["peak_rank_1"] <= b.memory["peak"] <= a.memory["peak"]
        assert b.trained_params == a.trained_params
        assert b.flops["total_train"] == pytest.approx(a.flops["total_train"], rel=0.05)


def test_two_processes_leave_the_files_of_one_command(two):
    folder, output = two
    assert len(list((folder / ".hydra").iterdir())) == 1 and not list((folder / ".claims").iterdir())
    assert output.count("record or reason") == 1  # one table


def test_what_two_processes_cannot_do_fails_and_can_be_run_by_one(two):
    (record,) = [r for r in records(two[0]) if r.method == "increlora"]
    assert record.status == "failed" and "leave out torchrun" in record.reason


def test_after_a_divergence_the_next_cell_runs_and_a_signal_stops_both_processes(tmp_path):
    long = ["method=lora", "train.steps=4000", "train.eval_every=4000", "train.checkpoint_seconds=0.5"]
    process = torchrun(tmp_path, *long, "train.lr=1e30,1e-3", "train.schedule=constant", "train.clip=null")
    deadline = time.monotonic() + 300
    while (
        not list(tmp_path.glob("*/checkpoint.safetensors")) and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=500)[0]
    assert process.returncode, output
    assert {(r.status, r.reason.split(" at ")[0].split(";")[0]) for r in records(tmp_path)} == {
        ("diverged", "Diverged: the loss is nan"),
        ("interrupted", "stopped by SIGTERM"),
    }
    assert len(list(tmp_path.glob("*/checkpoint.safetensors"))) == 1 and not list((tmp_path / ".claims").iterdir())
