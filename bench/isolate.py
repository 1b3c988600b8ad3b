"""A run in a process of its own: its peaks of memory are its alone, and its crash is a status of its own.

`run` calls this under any launcher. The child, which `warm.py` makes, reads the configuration as JSON, claims the run and
saves the record itself; this process lends it a share of a GPU, and writes the record only where the child died.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bench.config import Config, from_record
from bench.ledger import Claim, Claimed, holder
from bench.record import Record
from bench.warm import serve, server

RUNNING = 75  # the child's exit code where another worker has the run


def isolated(config: Config) -> bool:
    """Whether this run gets its own process: as `isolate` says, by default where it trains on a GPU."""
    import torch

    from bench.distributed import launched
    from bench.turns import member

    wish = str(config.isolate).lower()
    fits = config.device != "cpu" and torch.cuda.is_available() and launched() == 1
    if member() is not None:  # of a team in this process
        return False
    return wish == "true" or (wish == "auto" and fits)


def in_a_process(config: Config, record: Record, since: float | None) -> Record:
    """The record of a run by a child process. Raises Claimed where another worker computes it."""
    results = Path(config.results)
    if owner := holder(results, record.id, config.lease):
        raise Claimed(f"running elsewhere: process {owner.get('pid', '?')} on {owner.get('host', '?')}")
    warm = server(() if config.wandb == "off" else ("wandb",))
    killed = oom_kills()
    with share_of_gpu(config) as slot, tempfile.TemporaryFile("w+") as trace:
        job = {"config": record.config | {"isolate": False}, "since": since, "environment": slot.environment}
        code, peak = warm.run(job, (trace.fileno(), *slot.files))
        trace.seek(0)
        record.traceback = trace.read()
    if code == RUNNING:
        raise Claimed(f"{record.id} is running elsewhere")
    if code == 0:
        return Record.load(results / record.id)
    record.memory = {"peak_resident": peak}
    record.status, record.reason = death(code, peak, out_of_memory=oom_kills() > killed)
    with Claim(results, record.id, lease=config.lease, cell=record.cell, began=since):
        record.save(results)
    return record


def death(code: int, peak: int, *, out_of_memory: bool) -> tuple[str, str]:
    """Status and reason of a run whose process ended with exit code `code` at a resident peak of `peak` bytes."""
    if code >= 0:
        return "failed", f"the run's process ended with exit code {code}; its messages are above"
    name = signal.Signals(-code).name
    if -code in (signal.SIGTERM, signal.SIGINT):
        return "interrupted", f"stopped by {name} before it could write a checkpoint"
    if -code == signal.SIGKILL and out_of_memory:
        return "oom", f"killed by the kernel, which was out of memory, at a resident peak of {peak / 2**20:.0f} MiB"
    return "failed", f"the run's process died of {name} at a resident peak of {peak / 2**20:.0f} MiB"


def oom_kills() -> int:
    """How often this machine's kernel killed for want of memory since it started; 0 where it does not say."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class Slot:
    """A share of a GPU: what the child's environment says of it, and the locked file that the child keeps open."""

    def __init__(self, environment: dict[str, str] | None = None, file: IO[str] | None = None):
        self.environment = environment or {}
        self.files = () if file is None else (file.fileno(),)


@contextmanager
def share_of_gpu(config: Config, *, poll: float = 0.5) -> Iterator[Slot]:
    """Wait for one of `cells_per_gpu` places on any visible GPU, whatever launcher or sweep the others come from.

    A place is a locked file in this machine's temporary folder; the kernel frees it with the last process that holds it.
    Nothing is waited for on a CPU, or where `device` names one GPU.
    """
    devices = gpus() if config.device in ("auto", "cuda") else []
    places = [(device, k) for k in range(config.cells_per_gpu) for device in devices]
    while places:
        for device, k in places:
            if file := _locked(_folder() / f"{device}.{k}".replace("/", "_")):
                with file:
                    yield Slot({"CUDA_VISIBLE_DEVICES": device}, file)
                return
        time.sleep(poll)
    yield Slot()


def _locked(path: Path) -> IO[str] | None:
    """The file, locked until the last process that has it open closes it; None where another holds the lock."""
    file = open(path, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]


def _folder() -> Path:
    """Where the places of this user lie; a job of a cluster has GPUs of its own, which it numbers from 0."""
    job = os.environ.get("SLURM_JOB_ID", "")
    folder = Path(tempfile.gettempdir()) / f"paretune-gpus-{os.getuid()}{job and '-' + job}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM at the parent's death: the run then writes its checkpoint and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main(requests: str, *modules: str) -> int:
    """The server of `warm.py`; in each of its children one run, whose job is in the first of the files."""
    die_with_parent()
    text, trace, *_ = serve(int(requests), list(modules))
    die_with_parent()
    faulthandler.enable(file=trace)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s][%(name)s] %(message)s")
    with open(text) as file:
        job: dict[str, Any] = json.load(file)
    os.environ.update(job["environment"])
    from bench.run import run

    config = from_record(job["config"], job["config"]["classes"])
    record = run(config, since=job["since"])
    if record.status == "running":
        return RUNNING
    return 0 if (Path(config.results) / record.id / "record.json").exists() else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
