"""What a person sees at the end of a run or a sweep: a table of its cells, and the exit code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from bench.record import Record

FAILED = ("failed", "oom", "diverged", "interrupted")
COLUMNS = ("method", "model", "task", "seed", "status", "score", "trained", "memory", "s/step", "record or reason")
seen: list[Record] = []  # the records of this command, for its exit code


class Table(Callback):
    """Collects the records of a command's runs, which may have run in other processes, and prints them at its end."""

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        """Runs beside the job: leave word of its record in the job's own folder."""
        if job_return.status.name == "COMPLETED" and isinstance(job_return.return_value, str):
            folder = Path(config.hydra.runtime.output_dir)
            (folder / "record").write_text(job_return.return_value)

    def on_run_end(self, config: Any, **_: Any) -> None:
        """One run is a table of one row."""
        self._show([Path(config.hydra.run.dir)])

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """All cells of the sweep, in their order."""
        folders = [p for p in Path(config.hydra.sweep.dir).iterdir() if p.is_dir() and p.name.isdigit()]
        self._show(sorted(folders, key=lambda p: int(p.name)))

    def _show(self, folders: list[Path]) -> None:
        for folder in folders:
            if (folder / "record").exists():
                seen.append(_read((folder / "record").read_text(), folder))
        if seen:
            print(table(seen), flush=True)


def _read(word: str, folder: Path) -> Record:
    """The record that a job left word of; one that never was for a configuration that could not be run."""
    if not word.startswith("error: "):
        return Record.load(Path(word))
    choices = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.choices
    names: dict[str, Any] = {k: str(choices[k]) for k in ("method", "model", "task")}
    return Record(id="", seed=-1, config={}, status="failed", reason=word.removeprefix("error: "), **names)


def table(records: list[Record]) -> str:
    """One aligned line per record."""
    rows = [COLUMNS, *(_row(r) for r in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join(lines)


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
