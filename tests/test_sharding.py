"""shard=true: frozen weights shared out over two processes of torchrun (gloo, on a CPU); the run is that of one process."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from bench import distributed, sharding
from bench.config import compose
from bench.record import Record
from bench.run import run
from bench.train import Interrupted, Stop

ROOT = Path(__file__).parents[1]
# 9 rows in batches of 4: of the last batch of an epoch the second process has no row, of val it has one row less
SMALL = ["data=standin", "task.limit={train:9,val:5,test:5}", "wandb=off", "train.steps=5", "train.batch_size=4"]
SMALL += ["train.eval_every=3", "task.max_length=48"]
ENCODER = [*SMALL, "model=random_bert", "task=rte", "train.gradient_checkpointing=true"]
DECODER = [*SMALL, "model=random_llama", "task=gsm8k", "method=lora", "task.max_new_tokens=3", "spectra=true"]


def torchrun(results, *overrides):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "bench"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return subprocess.Popen([*launcher, *overrides, f"results={results}", "shard=true"], **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes trained an encoder, went on with a decoder, and could not train all weights."""
    folder, checks = tmp_path_factory.mktemp("two"), iter(range(2))

    def stop(self):
        if next(checks, None) is None:
            raise Interrupted("two steps are enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", stop)
        begun = run(compose([*DECODER, f"results={folder}"]))
    assert begun.status == "interrupted" and (folder / begun.id / "checkpoint.safetensors").exists()
    commands = torchrun(folder, *DECODER), torchrun(folder, "-m", *ENCODER, "method=lora,full_ft")
    outputs = [command.communicate(timeout=500)[0] for command in commands]
    assert [c.returncode for c in commands] == [0, 1], "".join(outputs)  # full_ft
    assert "going on from step" in outputs[0]
    return folder


@pytest.mark.parametrize("cell", [[*ENCODER, "method=lora"], DECODER], ids=["encoder", "decoder"])
def test_two_processes_with_half_of_the_weights_each_compute_the_numbers_of_one(tmp_path, two, cell):
    a = run(compose([*cell, f"results={tmp_path}"]))
    b = Record.load(two / a.id)
    assert (a.status, b.status) == ("ok", "ok"), b.reason + b.traceback
    losses = [[h["train/loss"] for h in r.history if "train/loss" in h] for r in (a, b)]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert (b.score, b.selected_step) == (a.score, a.selected_step)
    tables = [pd.read_parquet(folder / a.id / "predictions.parquet") for folder in (tmp_path, two)]
    assert tables[0]["prediction"].tolist() == tables[1]["prediction"].tolist()
    assert tables[1]["score"].tolist() == pytest.approx(tables[0]["score"].tolist(), abs=1e-5)
    for full in ("trained_params", "head_params", "stored_params", "stored_bytes", "total_params"):
        assert getattr(a, full) == getattr(b, full)
    trained = 4 * a.stored_params  # whole on both
    shared = b.memory["weights"] - trained
    assert shared == pytest.approx((a.memory["weights"] - trained) / 2, rel=0.05)  # and buffers
    assert b.environment["device"] == "2 x cpu, sharded" and b.memory["peak_rank_1"] < a.memory["peak"]
    assert b.flops == pytest.approx(a.flops, rel=0.2)  # of both devices; each pads its own rows
    if a.spectra:
        assert b.spectra["changed"] > 0 and b.spectra == pytest.approx(a.spectra, rel=1e-3)


def test_where_nothing_is_frozen_there_is_nothing_to_share_out(two):
    (record,) = [r for r in map(Record.load, two.glob("*/record.json")) if r.method == "full_ft"]
    assert record.status == "failed" and "all of them are trained: leave out shard=true" in record.reason


def test_one_process_cannot_share_its_weights_out(tmp_path):
    record = run(compose([*ENCODER, "method=lora", "shard=true", f"results={tmp_path}"]))
    assert record.status == "failed" and "torchrun" in record.reason


class Counted(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.calls, self.spare = 0, {"x": torch.ones(1, 1)}

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise MemoryError
        return SimpleNamespace(loss=super().forward(x).sum())


@pytest.fixture
def others(monkeypatch):
    """Another rank that has three calls to make."""
    left = iter([1, 1, 1])
    monkeypatch.setattr(distributed, "total", lambda own: own + next(left, 0))


def test_who_is_done_calls_the_model_on_and_adds_nothing_to_the_gradients(others):
    model = Counted()
    with sharding.in_step(model):
        model(torch.ones(1, 1)).loss.backward()
        gradient = model.weight.grad.clone()
        model.calls = -10
    assert model.calls == -8 and torch.equal(model.weight.grad, gradient)


@torch.no_grad()
def test_an_error_between_two_calls_waits_for_the_others(others):
    model = Counted()
    with pytest.raises(FloatingPointError), sharding.in_step(model):
        model(torch.ones(1, 1))
        model.calls = -10
        raise FloatingPointError
    assert model.calls == -8


@torch.no_grad()
def test_an_error_in_the_middle_of_a_call_ends_the_process(others):
    model = Counted()
    with pytest.raises(MemoryError), sharding.in_step(model):
        for _ in range(3):
            model(torch.ones(1, 1))
    assert model.calls == 3
