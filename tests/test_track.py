"""The mirror in W&B: what is on disk is what was logged, and nothing that fails there reaches the run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from bench.record import Record
from bench.track import Tracker, has_key, track


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No key, no server, no account of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {"id": "0123456789ab", "method": "lora", "model": "tiny", "task": "rte", "seed": 1}
    values["config"] = {"lr": 0.1, "seed": 1}
    return Record(**(values | changes))


def stored(folder: Path) -> list[Any]:
    """The records below `folder`, once the last one is there: W&B's service writes on after `finish` returns."""
    for _ in range(100):
        found = read(folder)
        if any(r.WhichOneof("record_type") == "exit" for r in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"no end of the run in {folder} after 10 s")


def read(folder: Path) -> list[Any]:
    """The records of the one `.wandb` file below `folder`: a 7-byte header, then a log in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/*run-*/run-*.wandb")
    data, at, payload, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + size > len(data):  # not all written yet
            break
        payload = (payload if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(payload)
    return found


def items(updates: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in updates}


def test_an_offline_run_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = record(experiment="grid")
    with track("offline", mine, tmp_path / "results" / mine.id, project="p") as tracker:
        tracker.log(10, {"loss": 0.5, "lr": None})
        tracker.log(20, {"loss": 0.25, "val/accuracy": 0.75})
        mine.score, mine.metrics, mine.memory = 0.7, {"test/accuracy": 0.7}, {"peak": 5, "peak_train": None}
        tracker.finish(mine)
    kinds = stored(tmp_path / "results" / mine.id)
    run = next(r.run for r in kinds if r.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.job_type) == ("p", "grid", "run")
    assert run.run_id.startswith(mine.id) and "lora" in list(run.tags)
    config = items(run.config.update)
    assert config["lr"] == 0.1 and config["id"] == mine.id
    history = [items(r.history.item) for r in kinds if r.WhichOneof("record_type") == "history"]
    assert [(h["_step"], h["loss"]) for h in history] == [(10, 0.5), (20, 0.25)]
    assert "lr" not in history[0] and history[1]["val/accuracy"] == 0.75
    summary: dict[str, Any] = {}
    for r in kinds:
        if r.WhichOneof("record_type") == "summary":
            summary |= items(r.summary.update)
    assert (summary["score"], summary["status"], summary["memory/peak"]) == (0.7, "ok", 5)
    assert "memory/peak_train" not in summary
    assert not (tmp_path / "wandb").exists()


def test_two_runs_in_one_process_stay_two(tmp_path):
    first, second = record(), record(id="ba9876543210", config={"lr": 0.2})
    with track("offline", first, tmp_path / "a") as a, track("offline", second, tmp_path / "b") as b:
        a.log(1, {"loss": 1.0})
        b.log(1, {"loss": 2.0})
        a.finish(first)
        b.finish(second)
    for folder, lr, loss in (("a", 0.1, 1.0), ("b", 0.2, 2.0)):
        kinds = stored(tmp_path / folder)
        (run,) = [r.run for r in kinds if r.WhichOneof("record_type") == "run"]
        losses = [items(r.history.item)["loss"] for r in kinds if r.WhichOneof("record_type") == "history"]
        assert (items(run.config.update)["lr"], losses) == (lr, [loss])


def test_an_exception_of_the_run_passes_and_ends_the_mirror(tmp_path):
    with pytest.raises(KeyError), track("offline", record(), tmp_path):
        raise KeyError
    (end,) = [r.exit for r in stored(tmp_path) if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


def test_off_imports_no_wandb(tmp_path):
    code = (
        "import sys; from bench.record import Record; from bench.track import track\n"
        "r = Record(id='x', method='m', model='m', task='t', seed=0, config={})\n"
        f"with track('off', r, {str(tmp_path)!r}) as t: t.log(1, {{'loss': 1.0}}); t.finish(r)\n"
        "assert not {'wandb', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert not list(tmp_path.iterdir())


def test_auto_without_a_key_is_offline_and_an_empty_mode_is_unset(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    with warnings.catch_warnings(), track("auto", record(), tmp_path) as tracker:
        warnings.simplefilter("error")
        tracker.log(1, {"loss": 1.0})
        tracker.finish(record())
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_online_without_a_key_warns_and_does_not_ask(tmp_path):
    with pytest.warns(UserWarning, match="no key"), track("online", record(), tmp_path) as tracker:
        tracker.finish(record())
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_key_is_found(monkeypatch, tmp_path):
    assert not has_key()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_key()


def test_nothing_that_fails_reaches_the_run(tmp_path, monkeypatch):
    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise OSError("disk full")

    tracker = Tracker(Broken())
    with pytest.warns(UserWarning, match="disk full"):
        tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish(record())

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no backend")

    monkeypatch.setattr("wandb.init", fail)
    with pytest.warns(UserWarning, match="no backend"), track("offline", record(), tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})


def test_another_mode_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="auto, online, offline, off"), track("on", record(), tmp_path):
        pass


@pytest.mark.slow
def test_an_unreachable_server_makes_it_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="tracking offline"), track("auto", record(), tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.finish(record())
    assert time.perf_counter() - start < 40
    assert list(tmp_path.glob("wandb/offline-run-*"))
