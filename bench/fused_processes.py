"""Parts of a sweep in processes of their own at the same time, one per share of the cores: each part is trained at once there.

What is small is bound by Python, which uses one core, not by products, which use all: two processes of four runs then take
little more than half of the time of one of eight. Each holds the backbone. The command's process forks them before it has
computed anything itself, passes signals on, and waits.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

Part = list[DictConfig]  # the configurations of jobs


def split(jobs: Sequence[Any], count: int) -> list[list[Any]]:
    """`jobs` in `count` parts of nearly equal size, each in its order."""
    return [[*jobs[k::count]] for k in range(min(count, len(jobs)))]


def apart(parts: list[Part], body: Callable[[Part], list[JobReturn]]) -> list[list[JobReturn]]:
    """`body` of each part in a fork of this process, all at the same time; what the jobs returned, without their configurations.

    Jobs of a process that died have failed, with a sentence.
    """
    from bench.train import handling
    from bench.warm import held_back, imported

    children: list[tuple[int, int]] = []

    def forward(number: int, frame: object) -> None:
        for child, _ in children:
            with suppress(ProcessLookupError):
                os.kill(child, number)

    imported()
    with handling(forward):
        with held_back():
            children += [_begun(part, body) for part in parts]
        found = [_ended(*child, part) for child, part in zip(children, parts, strict=True)]
    _note_stopped(found)
    return found


def _begun(part: Part, body: Callable[[Part], list[JobReturn]]) -> tuple[int, int]:
    """A process and the file that it leaves its answer in; signals are held back until it listens to them."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.close(read)
    code = 1
    try:
        _of_its_own()
        returned = [(job.status.name, str(job._return_value)) for job in body(part)]
        os.write(write, json.dumps(returned).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the parent's is closed, saved or shown here


def _of_its_own() -> None:
    from bench.isolate import die_with_parent
    from bench.train import SIGNALS

    os.setsid()  # Ctrl-C on a terminal reaches it through its parent alone, once
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _ended(child: int, answer: int, part: Part) -> list[JobReturn]:
    with open(answer, "rb") as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if text:
        return [_returned(JobStatus[name], value) for name, value in json.loads(text)]
    code = os.waitstatus_to_exitcode(status)
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = RuntimeError(f"the process of {len(part)} runs {how}; the same command takes up those that are not done")
    return [JobReturn(status=JobStatus.FAILED, _return_value=why) for _ in part]


def _returned(status: JobStatus, value: str) -> JobReturn:
    return JobReturn(status=status, _return_value=value if status is JobStatus.COMPLETED else RuntimeError(value))


def _note_stopped(found: list[list[JobReturn]]) -> None:
    """A run that a signal stopped in its process stops this command too."""
    from bench.record import Record
    from bench.table import stopped

    for job in (job for jobs in found for job in jobs if job.status is JobStatus.COMPLETED):
        path = Path(job.return_value) / "record.json"
        if path.exists() and (record := Record.load(path)).status == "interrupted":
            stopped.append(record)
