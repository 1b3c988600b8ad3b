"""Whole runs on tiny random models and generated rows: records, statuses, resuming, multiruns, real kills."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pandas as pd
import pytest

from bench.config import compose
from bench.evaluate import evaluate
from bench.record import Record, json_schema
from bench.run import run
from bench.session import Session

ROOT = Path(__file__).parents[1]
TINY = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:64,val:24,test:24}", "wandb=off"]
FAST = ["train.steps=8", "train.batch_size=8", "train.eval_every=4", "task.max_length=64"]


def config(tmp_path, *overrides):
    return compose([*TINY, *FAST, f"results={tmp_path}", *overrides])


def command(tmp_path, *overrides, **options):
    arguments = [sys.executable, "-m", "bench", *TINY, *FAST, f"results={tmp_path}", *overrides]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def numbers(record):
    return record.score, record.metrics, record.history, record.selected_step


def test_val_is_scored_once_per_evaluation(tmp_path, monkeypatch):
    """Also where an evaluation before the last was the best."""
    scored, score = [], Session.score

    def worse_each_time(self, split):
        table, metrics = score(self, split)
        scored.append(split)
        return table, metrics | {self.ready.task.metric: -float(len(scored))}

    monkeypatch.setattr(Session, "score", worse_each_time)
    record = run(config(tmp_path, "method=lora"))
    assert scored == ["val", "val", "test"] and record.selected_step == 4
    assert record.metrics["val/accuracy"] == -1 and record.metrics["last_val/accuracy"] == -2


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora"],
        ["method=bitfit", "task=stsb"],
        ["method=lora", "task=digits", "model=random_vit"],
        ["method=lora", "task=gsm8k", "model=random_llama", "task.max_new_tokens=4"],
    ],
    ids=["classification", "regression", "image", "generation"],
)
def test_every_kind_of_task(tmp_path, overrides):
    one = run(config(tmp_path, *overrides))
    assert one.status == "ok", one.reason + one.traceback
    assert one.task.endswith(" (stand-in)") and one.data["standin"]
    folder = tmp_path / one.id
    jsonschema.validate(json.loads((folder / "record.json").read_text()), json_schema())
    assert one.score == one.metrics[f"test/{one.metric}"]
    assert one.trained_params and one.stored_params == one.trained_params + one.head_params
    assert all(one.memory[k] > 0 for k in ("weights", "gradients", "optimizer", "activations", "peak"))
    assert one.flops["train_step"] > one.flops["forward"] > 0
    table = pd.read_parquet(folder / "predictions.parquet")
    assert set(table["split"]) == {"val", "test"}
    assert not table.duplicated(["split", "row_id"]).any()
    assert not set(table[table.split == "val"].row_id) & set(table[table.split == "test"].row_id)
    again = evaluate(folder)
    assert again["changed"] == 0
    assert again[f"test/{one.metric}"] == pytest.approx(one.score)


def test_same_seed_same_numbers_and_another_seed_others(tmp_path):
    first = run(config(tmp_path / "a"))
    assert numbers(run(config(tmp_path / "b"))) == numbers(first)
    assert numbers(run(config(tmp_path / "c", "seed=1"))) != numbers(first)


def test_a_done_run_is_not_run_again(tmp_path):
    path = tmp_path / run(config(tmp_path)).id / "record.json"
    before = path.stat().st_mtime_ns
    assert run(config(tmp_path)).status == "ok"
    assert path.stat().st_mtime_ns == before
    run(config(tmp_path, "force=true"))
    assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("overrides", "status", "reason"),
    [
        (["method.targets=nothing_like_this"], "skipped", "query"),
        (["method=full_ft", "train.lr=inf", "train.clip=null", "train.warmup=0"], "diverged", "lr"),
        (["model.path=/does/not/exist"], "failed", "exist"),
        (["data=real", "data.root=/does/not/exist"], "failed", "data.root"),
        (["device=cuda:7"], "failed", "device=cpu"),
    ],
)
def test_statuses(tmp_path, overrides, status, reason):
    one = run(config(tmp_path, *overrides))
    assert (one.status, reason in one.reason) == (status, True), one.reason
    assert Record.load(tmp_path / one.id).status == status


def test_what_training_leaves_behind_is_what_is_stored(tmp_path):
    one = run(config(tmp_path, "method=prefix_tuning", "method.hidden=16", "method.length=5", "train.steps=2"))
    prefix = 2 * 2 * 5 * 32  # layers, keys and values, length, width: the MLP is dropped
    assert one.status == "ok", one.traceback
    assert one.stored_params == prefix + one.head_params < one.trained_params


def test_checkpointing_computes_no_frozen_block_again(tmp_path):
    plain, checkpointed = (
        run(config(tmp_path, "method=linear_probe", f"train.gradient_checkpointing={on}")) for on in ("false", "true")
    )
    assert plain.history == checkpointed.history and plain.flops == checkpointed.flops


def test_out_of_memory_is_a_status(tmp_path, monkeypatch):
    import torch

    from bench import session as module

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "train", lambda *a, **k: full())
    assert run(config(tmp_path)).status == "oom"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_with_the_same_numbers(tmp_path, number):
    options = ["train.steps=60", "train.checkpoint_seconds=0.01", "train.eval_every=20", "method.dropout=0.1"]
    process = command(tmp_path, *options)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    if number == signal.SIGTERM:
        (old,) = tmp_path.glob("*/record.json")
        assert Record.load(old).status == "interrupted", output
    resumed = run(config(tmp_path, *options))
    assert resumed.status == "ok"
    whole = run(config(tmp_path / "whole", *options))
    assert numbers(resumed) == numbers(whole)
    assert not list(tmp_path.glob("*/checkpoint.safetensors"))


def test_multirun_keeps_going_and_says_what_failed(tmp_path):
    process = command(tmp_path, "model.path=random:bert,random:nothing", "method=lora,linear_probe", "-m")
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 1, output
    cells = {(r.method, r.config["model"]["path"]): r for r in map(Record.load, tmp_path.glob("*/record.json"))}
    assert len(cells) == 4
    for (method, path), cell in cells.items():
        expected = "ok" if path == "random:bert" else "failed"
        assert cell.status == expected, cell.traceback
        assert any(line.startswith(method) and f" {expected} " in line for line in output.splitlines()), output
    assert "random:nothing" in cells["lora", "random:nothing"].reason
    assert "Traceback" in cells["lora", "random:nothing"].traceback


def test_a_model_that_cannot_have_the_head_is_skipped(tmp_path):
    record = run(
        compose(["method=lora", "model=random_t5", "task=gsm8k", "data=standin", "wandb=off", f"results={tmp_path}"])
    )
    assert record.status == "skipped" and "transformers has no AutoModelForCausalLM of it" in record.reason
