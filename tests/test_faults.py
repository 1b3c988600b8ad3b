"""What happens to a sweep happens here for real: kills, crashes, full disks, hanging servers, two workers on one folder."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import isolate, ledger, track
from bench.config import compose
from bench.record import Record
from bench.run import run

ROOT = Path(__file__).parents[1]
TINY = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:48,val:12,test:12}", "wandb=off"]
FAST = ["train.steps=6", "train.batch_size=8", "train.eval_every=3", "task.max_length=48"]
CELLS = [[f"method={m}", f"seed={s}"] for m in ("lora", "bitfit", "galore") for s in (0, 1)]
SLOW = ["train.steps=100000", "train.eval_every=100000", "train.checkpoint_seconds=0.2"]
root_only = pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.test_faults", "bench.run", "transformers.models.bert.modeling_bert"])


def config(results, *overrides):
    return compose([*TINY, *FAST, f"results={results}", *overrides])


def command(results, *overrides, **options):
    flags = [o for o in overrides if o.startswith("-")]  # Hydra wants them before all overrides, or after all
    values = [*TINY, *FAST, f"results={results}", *(o for o in overrides if o not in flags)]
    arguments = [sys.executable, "-m", "bench", *flags, *values]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.Popen(arguments, cwd=ROOT, **options)


def records(results):
    return [Record.load(p) for p in Path(results).glob("*/record.json")]


def numbers(results):
    found = records(results)
    return {r.id: (r.status, r.score, r.metrics, r.history, r.selected_step, r.trained_params) for r in found}


def sweep(results, *overrides):
    """One worker: all cells, and again what others had claimed; leaves word of what it computed itself."""
    import bench.run as module

    compute = module._run

    def noted(record, *rest):
        with open(Path(results) / "computed", "a") as file:
            file.write(f"{record.id}\n")
        compute(record, *rest)

    module._run = noted
    torch.set_num_threads(1)
    left = [config(results, *cell, *overrides) for cell in CELLS]
    while left := [cell for cell in left if run(cell).status == "running"]:
        time.sleep(0.05)


def worker(*arguments):
    process = processes.Process(target=sweep, args=[str(a) for a in arguments])
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    for cell in CELLS:
        assert run(config(folder, *cell)).status == "ok"
    return numbers(folder)


def test_two_workers_on_one_folder_share_the_cells(tmp_path, undisturbed):
    both = [worker(tmp_path), worker(tmp_path)]
    for process in both:
        process.join(300)
    assert [p.exitcode for p in both] == [0, 0]
    assert numbers(tmp_path) == undisturbed
    computed = (tmp_path / "computed").read_text().split()
    assert sorted(computed) == sorted(undisturbed)  # each exactly once
    assert not list((tmp_path / ".claims").iterdir())


def test_a_sweep_of_two_processes_is_the_sweep_of_one(tmp_path, undisturbed):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = command(tmp_path, "-m", "hydra/launcher=processes", "method=lora,bitfit,galore", "seed=0,1")
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    assert numbers(tmp_path) == undisturbed
    assert (
        "#5 :" in output and len(output.rpartition("record or reason")[2].split("\n")) >= 7
    )  # the table has every cell


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_workers_killed_at_random_moments_lose_nothing(tmp_path, undisturbed, kills):
    draw, done, folders = random.Random(0), 0, 0
    while done < kills:
        folders += 1
        folder = tmp_path / str(folders)
        folder.mkdir()
        workers = [worker(folder, "train.checkpoint_seconds=0.01") for _ in range(2)]
        while done < kills and any(w.is_alive() for w in workers):
            time.sleep(draw.uniform(0.0, 1.5))
            victim = draw.randrange(2)
            if workers[victim].is_alive():
                workers[victim].kill()
                done += 1
            workers[victim].join()
            for path in folder.glob("*/record.json"):
                json.loads(path.read_text())  # whole, at any moment
            if not all(w.exitcode == 0 for w in workers):
                workers[victim] = worker(folder, "train.checkpoint_seconds=0.01")
        for w in workers:
            w.join(300)
        if any(w.exitcode for w in workers):
            sweep_again = worker(folder, "train.checkpoint_seconds=0.01")
            sweep_again.join(300)
            assert sweep_again.exitcode == 0
        assert numbers(folder) == undisturbed


def test_a_suspended_worker_does_not_overwrite_what_another_did(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_machine", lambda: "another machine")
    slow = [*SLOW, "lease=1.0"]
    process = command(tmp_path, *slow)
    claim = wait_for(lambda: ledger.newest(tmp_path / ".claims", next(iter(ids(tmp_path)), "-")), process)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.safetensors")), process)
    process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    while True:
        with contextlib.suppress(ledger.Claimed), ledger.Claim(tmp_path, claim.stem, lease=1.0):
            break
        assert time.monotonic() - begun < 30
        time.sleep(0.1)
    (tmp_path / claim.stem / "record.json").write_text(finished(config(tmp_path, *slow), claim.stem))
    before = (tmp_path / claim.stem / "record.json").read_text()
    process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output  # it took the other's record for its own
    assert (tmp_path / claim.stem / "record.json").read_text() == before


def finished(cfg, id):
    """The text of an ok record, as another worker would have written it."""
    import dataclasses

    from bench.run import _new_record

    record = _new_record(cfg)
    record.id, record.score, record.metric = id, 0.5, "accuracy"
    return json.dumps(dataclasses.asdict(record))


def ids(results):
    return {p.stem for p in (Path(results) / ".claims").glob("*.*")}


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    return found


def test_a_process_per_run_gives_the_same_numbers_and_its_crash_is_a_status(tmp_path, undisturbed):
    one = run(config(tmp_path, *CELLS[0], "isolate=true"))
    assert numbers(tmp_path)[one.id] == undisturbed[one.id]
    results = []
    runner = threading.Thread(target=lambda: results.append(run(config(tmp_path, *SLOW, "isolate=true"))))
    runner.start()
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("*/checkpoint.safetensors")):
        assert runner.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    (owner,) = ledger.holders(tmp_path, 120).values()
    os.kill(owner["pid"], signal.SIGSEGV)
    runner.join(60)
    assert results[0].status == "failed" and "SIGSEGV" in results[0].reason
    assert "Segmentation fault" in results[0].traceback and "train" in results[0].traceback
    assert results[0].memory["peak_resident"] > 2**20
    assert Record.load(tmp_path / results[0].id).status == "failed"


@pytest.mark.parametrize(
    ("code", "out_of_memory", "status"),
    [
        (-signal.SIGKILL, True, "oom"),
        (-signal.SIGKILL, False, "failed"),
        (-signal.SIGTERM, False, "interrupted"),
        (-signal.SIGBUS, False, "failed"),
        (1, False, "failed"),
    ],
)
def test_how_a_process_died(code, out_of_memory, status):
    found, reason = isolate.death(code, 3 * 2**20, out_of_memory=out_of_memory)
    assert found == status
    assert code > 0 or signal.Signals(-code).name in reason or "3 MiB" in reason


def test_out_of_memory_names_the_peak_and_the_next_cell_is_unharmed(tmp_path, undisturbed):
    one = run(config(tmp_path, "method=lora", "method.rank=1000000000000"))
    assert one.status == "oom", one.reason + one.traceback
    assert one.memory["peak_resident"] > 2**20
    again = run(config(tmp_path, *CELLS[0]))
    assert numbers(tmp_path)[again.id] == undisturbed[again.id]


@pytest.mark.parametrize("isolated", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_sigterm_stops_the_sweep_and_the_same_command_goes_on(tmp_path, isolated):
    cell = ["train.checkpoint_seconds=0.05", "train.steps=120", "train.eval_every=60"]
    long = ["-m", "seed=0,1", f"isolate={isolated}", *cell]
    with open(tmp_path / "log", "w") as log:  # no pipe, which a process that outlives the command would hold open
        process = command(tmp_path / "runs", *long, stdout=log)
        wait_for(lambda: list((tmp_path / "runs").glob("*/checkpoint.safetensors")), process, 400)
        process.send_signal(signal.SIGTERM)
        assert process.wait(400) == 130, (tmp_path / "log").read_text()
    left = [r.status for r in records(tmp_path / "runs") if r.status != "ok"]  # a slow signal reaches the second run
    assert left == ["interrupted"] and len(list((tmp_path / "runs").glob("*/checkpoint.safetensors"))) == 1
    again = command(tmp_path / "runs", *long)
    output = again.communicate(timeout=600)[0]  # a busy machine takes minutes to start four processes
    assert again.returncode == 0 and "going on from step" in output, output
    for seed in (0, 1):
        run(config(tmp_path / "whole", f"seed={seed}", *cell))
    assert numbers(tmp_path / "runs") == numbers(tmp_path / "whole")


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@root_only
def test_a_full_disk_leaves_nothing_half_written(tmp_path, undisturbed):
    with mounted(tmp_path / "small", "size=2m") as folder:
        filler = folder / "filler"
        for room in (4096, 8192, 16384):  # for the claim alone, for some of the files
            filler.write_bytes(b"x" * (2**21 - room))
            one = run(config(folder, *CELLS[0]))
            assert one.status == "failed" and "No space left" in one.reason, one.reason + one.traceback
            for path in folder.glob("*/record.json"):
                assert Record.load(path).status == "failed"
            assert not list(folder.glob("*/.*.part")) and not list(folder.glob(".claims/*"))
            filler.unlink()
        again = run(config(folder, *CELLS[0]))
        assert numbers(folder)[again.id] == undisturbed[again.id]


@root_only
def test_a_read_only_folder_is_an_error_before_anything_runs(tmp_path):
    with mounted(tmp_path / "fixed", "ro") as folder:
        process = command(folder / "runs")
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert f"results={folder}/runs cannot be written: Read-only file system" in output and "Traceback" not in output


def test_a_server_of_wandb_that_never_answers_stops_nothing(tmp_path, monkeypatch, undisturbed):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts through its backlog, says nothing
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(track, "TIMEOUT", 2)
        begun = time.monotonic()
        with pytest.warns(UserWarning, match="offline"):
            one = run(config(tmp_path, *CELLS[0], "wandb=online"))
    assert time.monotonic() - begun < 90
    assert numbers(tmp_path)[one.id] == undisturbed[one.id]


def test_places_on_gpus_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(isolate, "gpus", lambda: ["0", "GPU-abc"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cfg = config(tmp_path, "cells_per_gpu=2")
    got = []

    def fifth():
        with isolate.share_of_gpu(cfg, poll=0.01) as slot:
            got.append(slot.environment["CUDA_VISIBLE_DEVICES"])

    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(isolate.share_of_gpu(cfg)) for _ in range(2)]
        inner = contextlib.ExitStack()
        places += [inner.enter_context(isolate.share_of_gpu(cfg)) for _ in range(2)]
        assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in places] == ["0", "GPU-abc"] * 2
        thread = threading.Thread(target=fifth)
        thread.start()
        time.sleep(0.2)
        assert not got
        inner.close()
        thread.join(10)
        assert got == ["0"]
    with isolate.share_of_gpu(config(tmp_path, "device=cpu")) as slot:
        assert slot.environment == {} and slot.files == ()
