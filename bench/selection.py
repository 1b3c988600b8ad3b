"""The lock on the test split: in a tuning experiment it opens only for what the recorded choice on val has chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import Record, write_atomically

if TYPE_CHECKING:
    from bench.config import Config
    from tasks import Rows


class Locked(Exception):
    """The test split of this run may not be read; the message says what is missing."""


@dataclass
class Trial:
    """One point of a cell's space and what came of it."""

    values: dict[str, Any]
    record: Record | None = None

    @property
    def val(self) -> float | None:
        """The headline score on val at the selected checkpoint; None where the run did not end well."""
        r = self.record
        return r.metrics.get(f"val/{r.metric}") if r is not None and r.status == "ok" else None


def cell_name(choices: Any) -> str:
    """method_model_task, as files of `conf/best` are called."""
    return "_".join(str(choices[part]) for part in ("method", "model", "task"))


def selection_file(results: str | Path, cell: str) -> Path:
    """Where the choice for a cell is recorded."""
    return Path(results) / "selections" / f"{cell}.json"


def trials_folder(results: str | Path) -> Path:
    """Where the trials of a tuning experiment lie: not among the runs that are compared."""
    return Path(results) / "trials"


def write(results: str | Path, cell: str, selection: dict[str, Any]) -> Path:
    """Record a choice, atomically."""
    path = selection_file(results, cell)
    write_atomically(path, json.dumps(selection, indent=1, allow_nan=False) + "\n")
    return path


def best_file(selection: dict[str, Any], command: str) -> str:
    """The YAML of `conf/best` for a recorded choice: values, and in its head what chose them."""
    from omegaconf import OmegaConf

    parts: dict[str, dict[str, Any]] = {}
    for key, value in selection["values"].items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    trials = selection["trials"]
    lines = [
        "# @package _global_",
        f"# Of {len(trials)} trials ({selection['sampler']}, seed {selection['seed']}, {selection['steps']} steps in all) on "
        f"{selection['task']}, the best on val: {selection['winner']}, {selection['metric']} {selection['val']:.4f}.",
        f"# {command}",
        f"# trials: {' '.join(t['id'] for t in trials)}",
        f"# val: {' '.join('-' if t['val'] is None else format(t['val'], '.4f') for t in trials)}",
    ]
    return "\n".join(lines) + "\n" + OmegaConf.to_yaml(OmegaConf.create(parts))


def unlock(config: Config, rows: Rows) -> None:
    """Take the test rows away where `config.test` is "locked"; where "selected", raise Locked unless they are earned.

    That is: the cell's selection is recorded, all its trials have records, the configuration has exactly the chosen
    values, and its seed chose nothing.
    """
    if config.test == "locked":
        for split in config.task.scored():
            rows.splits.pop(split, None)
    elif config.test == "selected":
        _require(config)


def _require(config: Config) -> None:
    cell = cell_name(config.choices)
    path = selection_file(config.results, cell)
    if not path.exists():
        raise Locked(f"the test split of {cell} is locked until a choice on val is recorded in {path}: tune first")
    selection = json.loads(path.read_text())
    trials = [t["id"] for t in selection["trials"]]
    if missing := [t for t in trials if not (trials_folder(config.results) / t / "record.json").exists()]:
        raise Locked(f"{path} names trials without a record: {', '.join(missing)}")
    if selection["winner"] not in trials:
        raise Locked(f"{path}: the winner {selection['winner']} is none of its trials")
    if config.seed in (used := _seeds(config.results, trials)):
        raise Locked(f"seed={config.seed} has chosen the values of {cell}: report other seeds than {sorted(used)}")
    for key, value in selection["values"].items():
        part, _, name = key.partition(".")
        if (own := getattr(getattr(config, part), name)) != value:
            raise Locked(f"{key}={own} is not the chosen {value} of {path}")


def _seeds(results: str | Path, trials: list[str]) -> set[int]:
    return {Record.load(trials_folder(results) / t).seed for t in trials}
