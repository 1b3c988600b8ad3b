"""What a person sees at the end of a run or a sweep: a table of its cells, and the exit code."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from bench.record import Record

FAILED = ("failed", "oom", "diverged", "interrupted")
COLUMNS = ("method", "model", "task", "seed", "status", "score", "trained", "memory", "s/step", "record or reason")
WORD = "record"  # the file in a job's folder that names its record, or begins with one of these
ERROR, RUNNING, STOPPED = "error: ", "running: ", "stopped: "
stopped: list[Record] = []  # the run during which a signal came: the cells after it are not begun
seen: list[Record] = []  # the records of this command


@dataclass
class Waiting:
    """A cell that another worker computes: the folder of its record, and the command line that runs it here."""

    folder: Path
    lease: float
    arguments: list[str]


waiting: list[Waiting] = []  # the cells of this command that others compute


class Table(Callback):
    """Collects the records of a command's runs, which may have run in other processes, for `command_line` to show."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        """Stop before anything runs where the results cannot be written."""
        _writable(Path(config.results))

    on_multirun_start = on_run_start

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        """Runs beside the job: leave word of its record in the job's own folder."""
        if job_return.status.name == "COMPLETED" and isinstance(job_return.return_value, str):
            folder = Path(config.hydra.runtime.output_dir)
            (folder / WORD).write_text(job_return.return_value)

    def on_run_end(self, config: Any, **_: Any) -> None:
        """One run is a table of one row."""
        _collect([Path(config.hydra.run.dir)])

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """All cells of the sweep, in their order."""
        folders = [p for p in Path(config.hydra.sweep.dir).iterdir() if p.is_dir() and p.name.isdigit()]
        _collect(sorted(folders, key=lambda p: int(p.name)))


def _writable(results: Path) -> None:
    try:
        results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=results).close()
    except OSError as error:
        print(f"error: results={results} cannot be written: {error.strerror}; give another folder", file=sys.stderr)
        raise SystemExit(2) from None


def _collect(folders: list[Path]) -> None:
    for folder in folders:
        if (folder / WORD).exists():
            _sort((folder / WORD).read_text(), folder)


def _sort(word: str, folder: Path) -> None:
    """A cell is done, or waited for: others compute it, or were interrupted while nobody stopped this command."""
    if word.startswith(STOPPED):
        return
    record = None if word.startswith(RUNNING) else _read(word, folder)
    if record is not None and (record.status != "interrupted" or stopped):
        seen.append(record)
        return
    lease = OmegaConf.load(folder / ".hydra" / "config.yaml").lease
    waiting.append(Waiting(Path(word.removeprefix(RUNNING)), lease, arguments(folder)))


def arguments(folder: Path) -> list[str]:
    """The command line that composes a job's cell again, by the same launcher, from Hydra's notes in its folder."""
    hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
    multirun = ["-m"] if str(hydra.mode) == "MULTIRUN" else []
    return [*multirun, *hydra.overrides.hydra, *hydra.overrides.task]


def _read(word: str, folder: Path) -> Record:
    """The record that a job left word of; one that never was for a configuration that could not be run."""
    if not word.startswith(ERROR):
        return Record.load(Path(word))
    choices = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.choices
    names: dict[str, Any] = {k: str(choices[k]) for k in ("method", "model", "task")}
    return Record(id="", seed=-1, config={}, status="failed", reason=word.removeprefix(ERROR), **names)


def table(records: list[Record]) -> str:
    """One aligned line per record."""
    return aligned([COLUMNS, *(_row(r) for r in records)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as lines with aligned columns; the last one as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[-1]]).rstrip() for r in rows)


def _row(r: Record) -> tuple[str, ...]:
    score = "-" if r.score is None else f"{r.score:.4f} {r.metric}"
    trained = "-" if r.trained_params is None else f"{r.trained_params:,}"
    peak, step = r.memory.get("peak"), r.time.get("step")
    memory = "-" if peak is None else f"{peak / 2**20:.1f} MiB"
    seconds = "-" if step is None else f"{step:.3f}"
    last = r.reason or os.path.join(r.config["results"], r.id)
    return (
        r.method,
        r.model,
        r.task,
        str(r.seed) if r.seed >= 0 else "-",
        r.status,
        score,
        trained,
        memory,
        seconds,
        last,
    )


def exit_code(records: list[Record]) -> int:
    """0 where every cell is ok or skipped, 130 where one was interrupted, else 1."""
    statuses = {r.status for r in records}
    return 130 if "interrupted" in statuses else int(bool(statuses & set(FAILED)))
