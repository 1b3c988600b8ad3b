"""Claims: one owner at a time, whatever dies, sleeps or has a wrong clock."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import ledger
from bench.ledger import Claim, Claimed, holder, holders

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from bench.ledger import Claim
with Claim(sys.argv[1], "run", lease=float(sys.argv[2])) as claim:
    print("mine", flush=True)
    while True:
        time.sleep(0.02)
        claim.check()
"""


def hold(folder, lease=60.0):
    """Another process that holds the claim."""
    arguments = [sys.executable, "-c", HOLD, str(folder), str(lease)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def foreign(monkeypatch):
    """Make this process believe that it is on another machine than every other."""
    monkeypatch.setattr(ledger, "_machine", lambda: "another machine")


def watched(folder, lease):
    """Seconds until the claim of a dead owner may be taken."""
    begun = time.monotonic()
    while True:
        try:
            with Claim(folder, "run", lease=lease):
                return time.monotonic() - begun
        except Claimed:
            assert time.monotonic() - begun < 20
            time.sleep(0.02)


def test_one_owner_at_a_time_and_nothing_left_behind(tmp_path):
    with Claim(tmp_path, "run", lease=60, cell="lora tiny rte 0"):
        with pytest.raises(Claimed, match=f"process {os.getpid()}"), Claim(tmp_path, "run", lease=60):
            pass
        with Claim(tmp_path, "other", lease=60):
            assert set(holders(tmp_path, 60)) == {"run", "other"}
        assert holder(tmp_path, "run", 60)["cell"] == "lora tiny rte 0"
    assert not list((tmp_path / ".claims").iterdir())
    assert holders(tmp_path, 60) == {}


def _count(folder, tries):
    """Claim a run `tries` times; while it is ours nobody else's file may be there."""
    for _ in range(tries):
        try:
            with Claim(folder, "run", lease=60):
                inside = Path(folder) / "inside"
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where two are inside
                (Path(folder) / "done").open("a").write("x")
                inside.unlink()
        except Claimed:
            time.sleep(0.0005)


def test_many_processes_never_hold_it_together(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(str(tmp_path), 60)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [w.exitcode for w in workers] == [0] * 4
    assert len((tmp_path / "done").read_text()) > 10
    assert not list((tmp_path / ".claims").iterdir())


def test_a_death_on_this_machine_is_seen_at_once(tmp_path):
    process = hold(tmp_path)
    process.kill()
    process.wait()
    begun = time.monotonic()
    assert holder(tmp_path, "run", 60) is None
    with Claim(tmp_path, "run", lease=60) as claim:
        assert claim.path.suffix == ".2"
        claim.check()
    assert time.monotonic() - begun < 1
    assert not list((tmp_path / ".claims").iterdir())


def test_a_death_elsewhere_is_seen_after_a_lease_of_silence(tmp_path, monkeypatch):
    foreign(monkeypatch)
    process = hold(tmp_path, lease=0.6)
    time.sleep(1.2)
    with pytest.raises(Claimed):  # alive: it touches its claim
        Claim(tmp_path, "run", lease=0.6).__enter__()
    process.kill()
    process.wait()
    assert 0.4 < watched(tmp_path, 0.6) < 5


@pytest.mark.parametrize("skew", [-1e6, 1e6], ids=["past", "future"])
def test_a_wrong_clock_takes_nothing_from_the_living_and_keeps_nothing_for_the_dead(tmp_path, monkeypatch, skew):
    foreign(monkeypatch)
    process = hold(tmp_path, lease=0.9)
    path = ledger.newest(tmp_path / ".claims", "run")
    until = time.monotonic() + 2
    while time.monotonic() < until:  # the server's clock jumps now and then, the owner goes on touching
        os.utime(path, (time.time() + skew,) * 2)
        for _ in range(5):
            assert holder(tmp_path, "run", 0.9)["pid"] == process.pid
            time.sleep(0.05)
    process.kill()
    process.wait()
    os.utime(path, (time.time() + skew,) * 2)
    assert 0.2 < watched(tmp_path, 0.9) < 5


def test_a_suspended_owner_notices_that_it_lost(tmp_path):
    process = hold(tmp_path, lease=0.6)
    process.send_signal(signal.SIGSTOP)
    assert watched(tmp_path, 0.6) > 0.4
    process.send_signal(signal.SIGCONT)
    assert "Claimed: another worker took run over" in process.communicate(timeout=20)[1]


def test_a_claim_without_content_counts_as_alive(tmp_path):
    """Its maker is between making and writing it."""
    (tmp_path / ".claims").mkdir()
    (tmp_path / ".claims" / "run.1").touch()
    with pytest.raises(Claimed), Claim(tmp_path, "run", lease=60):
        pass
    assert watched(tmp_path, 0.3) < 5


def test_who_steps_in_late_steps_back(tmp_path, monkeypatch):
    """Two see the same dead claim; the second comes when the first has taken over, finished and gone."""
    folder = tmp_path / ".claims"
    folder.mkdir()
    (folder / "run.1").write_text(json.dumps({"machine": "gone"}))
    monkeypatch.setattr(ledger, "stale", lambda path, file, lease: True)
    late = Claim(tmp_path, "run", lease=60)
    make = late._make

    def delayed(generation):
        with Claim(tmp_path, "run", lease=60):
            pass
        make(generation)

    late._make = delayed
    with pytest.raises(Claimed):
        late.__enter__()
    assert not list(folder.iterdir())
