"""shard=true: weights shared out over two processes of torchrun (gloo, on a CPU); the run is that of one process."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench import distributed, sharding
from bench.config import compose
from bench.record import Record
from bench.run import run
from bench.train import Interrupted, Stop

ROOT = Path(__file__).parents[1]
# 9 rows in batches of 4: of the last batch of an epoch the second process has no row, of val it has one row less
SMALL = ["data=standin", "task.limit={train:9,val:5,test:5}", "wandb=off", "train.steps=5", "train.batch_size=4"]
SMALL += ["train.eval_every=3", "task.max_length=48", "train.lr=2e-3"]
ENCODER = [*SMALL, "model=random_bert", "task=rte", "train.gradient_checkpointing=true", "train.accumulate=2"]
ENCODER += ["train.clip=0.5"]  # some steps are clipped, as with the decoder's 2
DECODER = [*SMALL, "model=random_llama", "task=gsm8k", "task.max_new_tokens=3", "spectra=true", "train.clip=2"]
CELLS = {
    "encoder": [*ENCODER, "method=lora"],
    "decoder": [*DECODER, "method=lora"],
    "whole encoder": [*ENCODER, "method=full_ft"],
    "whole decoder": [*DECODER, "method=full_ft"],
}
STOPPED = """
import atexit, runpy
from bench.session import Session

class Kept:
    def __del__(self):
        print("taken down")

kept = Kept()
atexit.register(print, "all is done", flush=True)

tick = Session.tick

def stopped(self):
    if (self.record.method, self.loop.progress.step) == ("hft", 4):  # val was scored at 3
        self.stop.requested = "the test"
    tick(self)

Session.tick = stopped
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


def torchrun(results, *overrides):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    (results / "stopped.py").write_text(STOPPED)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*launcher, str(results / "stopped.py"), "-m", *overrides, f"results={results}", "shard=true"]
    return subprocess.Popen(command, **options)


def losses(record):
    return [h["train/loss"] for h in record.history if "train/loss" in h]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes trained encoders, stopped with one of them, and went on with decoders."""
    folder = tmp_path_factory.mktemp("two")
    for cell in (CELLS["decoder"], CELLS["whole decoder"]):
        checks = iter(range(2))

        def stop(self, checks=checks):
            if next(checks, None) is None:
                raise Interrupted("two steps are enough")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stop, "check", stop)
            begun = run(compose([*cell, f"results={folder}"]))
        assert begun.status == "interrupted" and (folder / begun.id / "checkpoint.safetensors").exists()
    commands = [torchrun(folder, *DECODER, "method=lora,full_ft")]
    commands += [torchrun(folder, *ENCODER, "method=lora,full_ft,lisa,hft")]
    outputs = [command.communicate(timeout=500)[0] for command in commands]
    assert [c.returncode for c in commands] == [0, 1], "".join(outputs)  # lisa, hft
    assert outputs[0].count("going on from step") == 2
    for text in outputs:  # threads of torch's groups, which live to the end, abort a Python that is taken down
        assert text.count("all is done") == 2 and "taken down" not in text
    return folder


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_two_processes_with_half_of_the_weights_each_compute_the_numbers_of_one(tmp_path, two, cell):
    a = run(compose([*cell, f"results={tmp_path}"]))
    b = Record.load(two / a.id)
    assert (a.status, b.status) == ("ok", "ok"), b.reason + b.traceback
    assert len(losses(a)) == 5 and losses(b) == pytest.approx(losses(a), abs=1e-6)
    assert (b.score, b.selected_step) == (a.score, a.selected_step)
    tables = [pd.read_parquet(folder / a.id / "predictions.parquet") for folder in (tmp_path, two)]
    assert tables[0]["prediction"].tolist() == tables[1]["prediction"].tolist()
    assert tables[1]["score"].tolist() == pytest.approx(tables[0]["score"].tolist(), abs=1e-5)
    for full in ("trained_params", "head_params", "stored_params", "stored_bytes", "total_params"):
        assert getattr(a, full) == getattr(b, full)
    states = [load_file(folder / a.id / "state.safetensors") for folder in (tmp_path, two)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-4)
    whole = 4 * a.stored_params if a.method == "lora" else 0  # what it trains, on both
    shared = b.memory["weights"] - whole
    assert shared == pytest.approx((a.memory["weights"] - whole) / 2, rel=0.1)  # and buffers
    for kind in ("gradients", "optimizer"):
        assert b.memory[kind] == pytest.approx(a.memory[kind] / (1 if whole else 2), rel=0.01)
    assert b.environment["device"] == "2 x cpu, sharded" and b.memory["peak_rank_1"] < a.memory["peak"]
    assert b.flops == pytest.approx(a.flops, rel=0.2)  # of both devices; each pads its own rows
    if a.spectra:
        assert b.spectra["changed"] > 0 and b.spectra == pytest.approx(a.spectra, rel=1e-3)


def test_one_process_goes_on_where_two_were_stopped(tmp_path, two):
    cell = [*ENCODER, "method=hft"]
    a = run(compose([*cell, f"results={tmp_path}"]))
    stopped = Record.load(two / a.id)
    assert stopped.status == "interrupted" and len(losses(stopped)) == 4
    b = run(compose([*cell, f"results={two}"]))
    assert (a.status, b.status) == ("ok", "ok"), b.reason + b.traceback
    assert len(losses(a)) == 5 and losses(b) == pytest.approx(losses(a), abs=1e-6)


def test_what_a_method_needs_whole_is_not_shared_out(two):
    (record,) = [r for r in map(Record.load, two.glob("*/record.json")) if r.method == "lisa"]
    assert record.status == "failed" and "needs all of them whole: leave out shard=true" in record.reason


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
