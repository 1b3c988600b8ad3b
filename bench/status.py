"""python -m bench.status RUNS [--watch]: how far the sweeps of a results folder are, from its files alone."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bench.ledger import holders, now
from bench.record import STATUSES

LEASE = 120.0  # as in the configuration: who is silent for longer is not shown as running


@dataclass
class Sweep:
    """One grid, however many workers or restarts share it. Times are of the results' file system."""

    name: str
    began: list[float] = field(default_factory=list)  # of each command
    cells: int | None = None  # unknown where another sweeper than the grid proposes them
    ids: set[str] = field(default_factory=set)  # of the cells that some command has dealt with
    refused: int = 0  # cells whose configuration could not be run: they have no record
    statuses: Counter[str] = field(default_factory=Counter)
    finished: list[float] = field(default_factory=list)  # when records were written, since it began
    running: int = 0

    @property
    def left(self) -> int | None:
        """Cells that nobody has dealt with or deals with now."""
        done = len(self.ids) + self.refused - self.statuses["interrupted"]
        return None if self.cells is None else max(0, self.cells - done - self.running)

    @property
    def rate(self) -> float | None:
        """Cells per second, from the beginning to the last record."""
        seconds = max(self.finished, default=0.0) - min(self.began, default=0.0)
        return len(self.finished) / seconds if self.finished and self.began and seconds > 0 else None

    @property
    def eta(self) -> float | None:
        """Seconds until the last cell at that rate."""
        ahead = None if self.left is None else self.left + self.running
        return ahead / self.rate if ahead is not None and self.rate else None


def read(runs: Path) -> tuple[list[Sweep], dict[str, dict[str, Any]]]:
    """The sweeps of a folder, and who computes what: the owners of live claims by run id."""
    owners = holders(runs, LEASE)
    records = {p.parent.name: _record(p, p.stat().st_mtime) for p in runs.glob("*/record.json")}
    sweeps = _sweeps(runs)
    others = Sweep("single runs", ids=set(records) - {id for s in sweeps for id in s.ids}, refused=0)
    for sweep in [*sweeps, others]:
        known = [records[id] for id in sweep.ids if id in records]
        sweep.statuses.update(status for status, _ in known)
        sweep.statuses["failed"] += sweep.refused
        sweep.finished = [at for status, at in known if at >= min(sweep.began, default=0.0) and status != "interrupted"]
        sweep.running = sum(owner.get("began") in sweep.began for owner in owners.values())
    others.running = len(owners) - sum(s.running for s in sweeps)
    return [*sweeps, *([others] if others.ids or others.running else [])], owners


def _sweeps(runs: Path) -> list[Sweep]:
    found: dict[str, Sweep] = {}
    for file in sorted(runs.glob(".hydra/*/multirun.yaml"), key=lambda p: p.stat().st_mtime):
        name, cells = _plan(file, file.stat().st_mtime)
        sweep = found.setdefault(name, Sweep(name, cells=cells))
        sweep.began.append(file.stat().st_mtime)
        refused = 0
        for word in (p.read_text() for p in file.parent.glob("*/record")):
            if word.startswith("error: "):
                refused += 1
            elif not word.startswith(("running: ", "stopped: ")):
                sweep.ids.add(Path(word).name)
        sweep.refused = max(sweep.refused, refused)
    return list(found.values())


@cache
def _record(path: Path, changed: float) -> tuple[str, float]:
    """Status and time of a record that was written at `changed`."""
    return json.loads(path.read_text())["status"], changed


@cache
def _plan(file: Path, changed: float) -> tuple[str, int | None]:
    """What a sweep's command asked for, and how many cells that are."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from omegaconf import OmegaConf

    hydra = OmegaConf.load(file).hydra
    parser = OverridesParser.create()
    overrides = [*(f"{k}={v}" for k, v in (hydra.sweeper.get("params") or {}).items()), *hydra.overrides.task]
    chosen = {o.get_key_element(): o for o in parser.parse_overrides(overrides)}
    name = " ".join(o.input_line or "" for o in chosen.values() if not o.get_key_element().startswith("results"))
    swept = [o for o in chosen.values() if o.is_sweep_override()]
    if not hydra.sweeper._target_.endswith("BasicSweeper") or any(isinstance(o.value(), Glob) for o in swept):
        return name, None
    cells = 1
    for override in swept:
        cells *= sum(1 for _ in override.sweep_string_iterator())
    return name, cells


def show(runs: Path) -> Any:
    """The tables of sweeps and of running cells, for rich."""
    from rich.console import Group
    from rich.table import Table

    sweeps, owners = read(runs)
    at = now(runs)
    columns = ("cells", *STATUSES, "running", "waiting", "per hour", "ready in")
    table = Table("sweep", title=str(runs))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for sweep in sweeps:
        table.add_row(sweep.name, *_row(sweep))
    cells = Table("running", "run", "by", "for", "last sign")
    for id, owner in owners.items():
        by = f"{owner.get('host')}:{owner.get('pid')}"
        spent, silent = (max(0.0, at - owner.get(k, at)) for k in ("since", "touched"))
        cells.add_row(owner.get("cell", ""), id, by, duration(spent), f"{duration(silent)} ago")
    return Group(table, cells) if owners else table


def _row(sweep: Sweep) -> Iterator[str]:
    yield "?" if sweep.cells is None else str(sweep.cells)
    for status in STATUSES:
        yield str(sweep.statuses[status] or "")
    yield str(sweep.running or "")
    yield "?" if sweep.left is None and sweep.began else str(sweep.left or "")
    yield f"{sweep.rate * 3600:.0f}" if sweep.rate else ""
    yield duration(sweep.eta) if sweep.eta else ""


def duration(seconds: float) -> str:
    """`5 s`, `12 min`, `3.5 h`, `2.1 d`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def main(arguments: list[str] | None = None) -> int:
    """Show the status once, or with --watch every few seconds until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m bench.status", description=__doc__)
    parser.add_argument("runs", type=Path, help="the results folder of a sweep")
    parser.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="again and again (5)")
    given = parser.parse_args(arguments)
    if not given.runs.is_dir():
        print(f"error: {given.runs} is no folder; give the results= of a sweep", file=sys.stderr)
        return 2
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=180)
    if given.watch is None:
        console.print(show(given.runs))
    else:
        _watch(console, given.runs, given.watch)
    return 0


def _watch(console: Any, runs: Path, seconds: float) -> None:
    from rich.live import Live

    try:
        with Live(show(runs), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(seconds)
                live.update(show(runs), refresh=True)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    sys.exit(main())
