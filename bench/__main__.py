"""python -m bench method=lora task=rte: compose the configuration, run each cell, keep its record."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

import tasks  # noqa: F401  (fills Hydra's store with the schemas of tasks)
from bench.config import to_config
from bench.imports import at_the_end, collect

if TYPE_CHECKING:
    from bench.record import Record

POLL = 1.0  # seconds between two looks at a cell that runs elsewhere


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: Any) -> str:
    """One cell of the grid. What goes wrong inside it ends in its record, whose path this returns, or else word of why not."""
    from bench.table import stopped

    if stopped:
        return f"stopped: {stopped[0].reason}"
    try:
        config = to_config(cfg, HydraConfig.get().runtime.choices)
    except (ValueError, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        return f"error: {error}"
    import datasets  # noqa: F401  (every run asks for its rows)

    from bench.run import run

    collect()
    record = run(config, since=_since())
    if record.status == "interrupted":
        stopped.append(record)
        _requeue(record)
    path = Path(config.results) / record.id
    if record.status == "running":
        return f"running: {path}"
    return str(path) if (path / "record.json").exists() else f"error: {record.reason}"


def _requeue(record: Record) -> None:
    """Give SLURM's warning of the time limit on to submitit, which queues this job again. The checkpoint is written."""
    if record.reason.startswith("stopped by SIGUSR2") and callable(signal.getsignal(signal.SIGUSR2)):
        signal.raise_signal(signal.SIGUSR2)


def _since() -> float:
    """When this command began, in the time of the results' file system: what Hydra wrote first."""
    hydra = HydraConfig.get()
    job = Path(hydra.runtime.output_dir) / ".hydra" / "config.yaml"
    sweep = Path(hydra.sweep.dir) / "multirun.yaml"
    return (sweep if hydra.mode == RunMode.MULTIRUN and sweep.exists() else job).stat().st_mtime


def command_line() -> int:
    """Run `main`; add what was probably meant to Hydra's message about a misspelled key or choice."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        from bench.help import show

        show()
        return 0
    gc.disable()  # until `main`: modules and configurations are no garbage, and looking at them takes a second
    atexit.register(at_the_end)
    import methods  # noqa: F401  (fills Hydra's store with the schemas of methods)
    from bench.suggest import suggest
    from bench.table import exit_code, seen, table

    if _by_torchrun() and int(os.environ["RANK"]):
        return _follow()
    messages = _Tee(sys.stderr)
    try:
        with contextlib.redirect_stderr(messages), _ranks():
            main()
            _second_pass()
    except SystemExit as stop:
        if stop.code and (hint := suggest(messages.getvalue(), sys.argv[1:])):
            print(hint, file=sys.stderr)
        raise
    if seen:
        print(table(seen), flush=True)
    return exit_code(seen)


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _ranks() -> Any:
    """torchrun's other processes, where it started any."""
    if not _by_torchrun():
        return contextlib.nullcontext()
    from bench.distributed import ranks

    return ranks()


def _follow() -> int:
    """A rank of torchrun that takes part in what rank 0 computes."""
    from bench.distributed import ranks, work
    from bench.run import follow
    from bench.train import stoppable

    with stoppable() as stop, ranks():
        work(lambda values: follow(values, stop))
    return 0


def _second_pass() -> None:
    """Wait for the cells that other workers compute; run here, by the same launcher, what they leave behind."""
    from bench.ledger import holder
    from bench.record import Record
    from bench.table import seen, stopped, waiting

    if waiting:
        print(f"waiting for {len(waiting)} cells that run elsewhere: `python -m bench.status` shows them", flush=True)
    while waiting and not stopped:
        cell = waiting.pop(0)
        if holder(cell.folder.parent, cell.folder.name, cell.lease):
            waiting.append(cell)
            time.sleep(POLL)
        elif (cell.folder / "record.json").exists() and (old := Record.load(cell.folder)).status != "interrupted":
            seen.append(old)
        else:
            sys.argv[1:] = cell.arguments
            main()


class _Tee(io.StringIO):
    """Keeps the beginning of what is written to a stream, which shows it all as before."""

    def __init__(self, stream: Any):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        if self.tell() < 10_000:
            super().write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


def _leave(code: int) -> None:
    """End a process of torchrun without taking Python down: threads of a group that torch still holds on to would abort it there."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    ended = command_line()
    if _by_torchrun():
        _leave(ended)
    sys.exit(ended)
