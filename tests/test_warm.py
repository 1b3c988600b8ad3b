"""The process that does the imports and forks one child per run: what its children are, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import matmul, warm
from bench.config import compose
from bench.ledger import holders
from bench.record import Record
from bench.run import run

ROOT = Path(__file__).parents[1]
TINY = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:48,val:12,test:12}", "wandb=off"]
FAST = ["train.steps=6", "train.batch_size=8", "train.eval_every=3", "task.max_length=48", "isolate=true"]
SLOW = ["train.steps=100000", "train.eval_every=100000", "train.checkpoint_seconds=0.2"]
COLD = """
import sys
from bench.config import compose
from bench.run import run
run(compose(sys.argv[1:]))
"""
IMPORTS = """
import importlib, os, sys, threading, torch
def asked(*_):
    raise AssertionError("an import asks for a GPU, which spoils it for forked processes")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = asked
state = torch.get_rng_state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert torch.equal(state, torch.get_rng_state()), "an import draws"
assert threading.active_count() == 1
if sys.platform == "linux":
    threads = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    assert len([t for t in threads if t != "jemalloc_bg_thd"]) == 1, threads  # pyarrow's allocator, which knows of forks
"""


def config(results, *overrides):
    return compose([*TINY, *FAST, f"results={results}", *overrides])


def kept(results):
    """All of the records but seconds and where they lie."""
    records = [Record.load(path) for path in Path(results).glob("*/record.json")]
    for r in records:
        r.time = {}
        r.config = {k: v for k, v in r.config.items() if k not in ("results", "isolate")}
    return {r.id: r for r in records}


@pytest.fixture(scope="module", autouse=True)
def server():
    """One server for this file, whatever pytest writes into the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "_threads", threading.local())
        patch.setattr(warm, "_setting", lambda: ("", {}))
        yield warm.server
        warm.close()


def test_the_record_is_that_of_a_cold_process(tmp_path):
    run(config(tmp_path / "other", "seed=1", "method=galore"))
    assert run(config(tmp_path / "warm")).status == "ok"
    overrides = [*TINY, *FAST, f"results={tmp_path / 'cold'}", "isolate=false"]
    subprocess.run([sys.executable, "-c", COLD, *overrides], cwd=ROOT, check=True, capture_output=True)
    assert kept(tmp_path / "warm") and kept(tmp_path / "warm") == kept(tmp_path / "cold")


@pytest.mark.skipif(not matmul.available(), reason="this torch has no oneDNN")
def test_each_run_has_its_products_computed_as_it_says(tmp_path):
    """The server computes nothing: what one child installs is gone in the next."""
    ways = ("onednn", "torch", "onednn")
    records = [run(config(tmp_path, f"seed={i}", f"matmul={way}")) for i, way in enumerate(ways)]
    assert [r.environment["matmul"] for r in records] == [*ways]
    assert len({r.environment["fingerprint"] for r in records}) == 2


def test_imports_leave_nothing_behind():
    subprocess.run([sys.executable, "-c", IMPORTS, *warm.MODULES, "wandb"], cwd=ROOT, check=True)


def test_another_environment_or_folder_gets_another_server(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "_threads", threading.local())
    monkeypatch.setattr(warm, "_setting", lambda: (os.getcwd(), os.environ.get("PARETUNE_TEST")))
    monkeypatch.setattr(warm, "MODULES", ("json",))
    servers = [warm.server()]
    assert warm.server() is servers[0]
    monkeypatch.setenv("PARETUNE_TEST", "other")
    servers.append(warm.server())
    monkeypatch.chdir(tmp_path)
    servers.append(warm.server())
    servers[-1].process.kill()
    servers[-1].process.wait()
    servers.append(warm.server())
    assert len(set(servers)) == 4
    assert all(s.process.returncode is not None for s in servers[:3])
    warm.close()


@pytest.mark.parametrize("whose", ["child", "server"])
def test_a_kill_is_a_status_and_the_next_run_is_unharmed(tmp_path, server, whose):
    slow = config(tmp_path, *SLOW)
    killer = threading.Thread(target=kill, args=[tmp_path, whose, server().process.pid])
    killer.start()
    first = run(slow)
    killer.join()
    if whose == "child":
        assert (first.status, "SIGKILL" in first.reason) == ("failed", True)
        assert first.memory["peak_resident"] > 2**20
    else:  # the child is asked to stop, and writes its record while this process writes, or waits for it
        assert first.status in ("failed", "running")
        wait_for(lambda: not list((tmp_path / ".claims").glob("*.*")))
    assert run(config(tmp_path, "seed=5")).status == "ok"


def test_a_signal_reaches_the_run_which_writes_its_checkpoint(tmp_path):
    def stop():
        wait_for(lambda: list(tmp_path.glob("*/checkpoint.safetensors")))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    record = run(config(tmp_path, *SLOW))
    thread.join()
    assert record.status == "interrupted" and "SIGTERM" in record.reason
    assert Record.load(tmp_path / record.id).status == "interrupted"


def kill(results, whose, server):
    wait_for(lambda: list(results.glob("*/checkpoint.safetensors")))
    (owner,) = holders(results, 120).values()
    os.kill(owner["pid"] if whose == "child" else server, signal.SIGKILL)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
