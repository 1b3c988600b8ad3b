"""Read a folder of records into one table: one row per run, one flat column per value."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.columns import COSTS
from analysis.defaults import complete
from bench.record import NOT_IDENTITY, STATUSES, TASK_FACTS, Record

_NUMBERS = ("metrics", "memory", "time", "flops", "energy", "spectra")
_NOT_SETTINGS = ("seed", "test", *NOT_IDENTITY)
_SOFTWARE = ("torch", "transformers", "cuda")  # what computes a run's numbers and takes its seconds
_FIELDS = {f.name: str(f.type) for f in dataclasses.fields(Record)}
NESTED = [name for name, kind in _FIELDS.items() if kind.startswith("dict")]
_SCALARS = [name for name, kind in _FIELDS.items() if not kind.startswith(("dict", "list"))]


class NoRuns(FileNotFoundError):
    """There is nothing to read; the message says where we looked and what makes records."""


def load(folder: str | Path = "results") -> pd.DataFrame:
    """One row per run of `folder/*/record.json`, whatever its status; also of result files that `analysis.imports` reads.

    Also of one file that `bench.collect` wrote. Predictions, curves and spectra are not in it: they are found where the file
    lies in the folder of its runs.

    Nested values become `memory_peak`, `time_step`, `data_standin`, `config_train_lr`, `metrics_test/accuracy`, ...
    Keys of a configuration that came after a record was written have their defaults there (`analysis/defaults.py`).
    Derived columns: `source` (whose results: "paretune" for records), `protocol`, `device`, `memory_kind`, `cpu` (which one,
    its threads, and who computes products, torch or onednn, of runs that were timed on a CPU), `software`
    (fingerprint of the versions), `settings` (hash of the config without the seed), `data_fingerprint` (content of the
    test split) and `path`.
    A file that is no record is left out, named in `df.attrs["problems"]` (path, problem) and in one warning.

    Raises NoRuns where the folder is missing or holds no readable record.
    """
    from analysis.imports import foreign_rows

    folder = Path(folder)
    if folder.is_file():
        bad: list[tuple[str, str]] = []
        return table_of(_rows(_collected(folder), bad), bad)
    if not folder.is_dir():
        raise NoRuns(f"{folder}: no such folder (looked from {Path.cwd()}). {_WAY_OUT}")
    rows, problems = foreign_rows(folder)
    rows += _rows(_records(folder, problems), problems)
    if not rows and not problems:
        raise NoRuns(f"{folder}: no record (<id>/record.json) in this folder. {_WAY_OUT}")
    if problems:
        warnings.warn(_describe(problems), stacklevel=2)
    if not rows:
        raise NoRuns(f"{folder}: none of its {len(problems)} record files can be read. {_describe(problems)}")
    return table_of(rows, problems)


_WAY_OUT = "Give the folder that runs were written to (results=...), or make one: python -m bench method=lora task=rte"


def _describe(problems: list[tuple[str, str]]) -> str:
    shown = "; ".join(f"{path} ({problem})" for path, problem in problems[:3])
    return f"{len(problems)} file(s) left out: {shown}{'; ...' if len(problems) > 3 else ''}"


def _collected(file: Path) -> list[tuple[Record, Path]]:
    """The records of a file of `bench.collect`, and where each has its folder if the file lies in that of its runs."""
    from bench.collect import records

    try:
        found = records(file)
    except (ValueError, KeyError) as error:
        raise NoRuns(f"{file}: not a file that python -m bench.collect wrote ({error}). {_WAY_OUT}") from error
    if not found:
        raise NoRuns(f"{file}: holds no record. {_WAY_OUT}")
    return [(record, file.parent / name / "record.json") for name, record in found]


def _records(folder: Path, problems: list[tuple[str, str]]) -> list[tuple[Record, Path]]:
    """The records below `folder`; what is none is added to `problems`."""
    found = []
    for path in sorted(folder.glob("*/record.json")):
        with _naming(path, problems):
            record = Record.load(path)
            _check(record)
            found.append((record, path))
    return found


@contextmanager
def _naming(path: Path, problems: list[tuple[str, str]]) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        problems.append((str(path), f"{type(error).__name__}: {error}"))


def _rows(found: list[tuple[Record, Path]], problems: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row per record; a key that is new in some of their configurations has its default in the others."""
    rows: list[dict[str, Any]] = []
    for (record, path), config in zip(found, complete(record.config for record, _ in found), strict=True):
        record.config = config
        with _naming(path, problems):
            rows.append(_row(record, path))
    return rows


def _row(record: Record, path: Path) -> dict[str, Any]:
    _check(record)
    row = {name: getattr(record, name) for name in _SCALARS}
    row["warnings"] = len(record.warnings)
    for name in NESTED:
        _flatten(getattr(record, name), name, row)
    return row | _derived(record) | {"path": str(path)}


def _check(record: Record) -> None:
    """Raise ValueError where a value has not the type that the record declares."""
    if record.status not in STATUSES:
        raise ValueError(f"status {record.status!r} is none of {', '.join(STATUSES)}")
    for name, kind in _FIELDS.items():
        value = getattr(record, name)
        if not _matches(value, kind):
            raise ValueError(f"{name} is {value!r:.60}, not {kind}")
        if name in _NUMBERS and not all(_matches(v, "float | None") for v in value.values()):
            raise ValueError(f"{name} holds something that is not a number: {value!r:.60}")


def _matches(value: Any, kind: str) -> bool:
    if value is None:
        return kind.endswith("None")
    if kind.startswith("dict"):
        return isinstance(value, dict)
    if kind.startswith("list"):
        return isinstance(value, list)
    if kind.startswith("str"):
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > sys.float_info.max


def _flatten(value: Any, name: str, row: dict[str, Any]) -> None:
    """Put every leaf of `value` into `row` as `name_key_key`; a list stays one cell, as JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{name}_{key}", row)
    else:
        row[name] = json.dumps(value) if isinstance(value, list) else value


def _derived(record: Record) -> dict[str, Any]:
    environment, data = record.environment, record.data
    prints = data.get("fingerprints")
    settings = {k: v for k, v in record.config.items() if k not in _NOT_SETTINGS}
    if isinstance(task := settings.get("task"), dict):
        settings["task"] = {k: v for k, v in task.items() if k not in TASK_FACTS}
    return {
        "source": "paretune",
        "protocol": _text(data.get("protocol")),
        "device": _text(environment.get("device")),
        "memory_kind": _text(environment.get("memory")),
        "padding": (record.model_source.get("padding") or {}).get("kind"),
        "cpu": _cpu(record),
        "software": _text(environment.get("software") or {k: environment.get(k) for k in _SOFTWARE}) or None,
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8],
        "data_fingerprint": _text(prints.get("test")) if isinstance(prints, dict) else None,
        "data_standin": bool(data.get("standin")) or record.task.endswith("(stand-in)"),
    }


def _cpu(record: Record) -> str | None:
    """Whose seconds they are: "AMD EPYC, 2 threads, products by onednn"; None on a GPU, and where no step was timed (fused runs)."""
    environment = record.environment
    if not str(environment.get("device")).endswith("cpu") or not (record.time.get("step") or record.time.get("eval")):
        return None
    threads, products = environment.get("threads"), environment.get("matmul") or "torch"  # as before there was a choice
    return f"{environment.get('cpu') or 'cpu'}, {threads} threads, products by {products}"


def _text(value: Any) -> str | None:
    """`{"torch": "2.13", ...}` as one comparable line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in sorted(value.items()) if v is not None)
    return None if value is None else str(value)


def table_of(rows: list[dict[str, Any]], problems: list[tuple[str, str]]) -> pd.DataFrame:
    """Rows of one key per column as a table: scores and costs first and as floats; `problems` go into `attrs`."""
    names = dict.fromkeys([*COSTS, "score"]) | dict.fromkeys(key for row in rows for key in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    numeric = {n for n in names if n in COSTS or n.startswith(tuple(f"{k}_" for k in _NUMBERS))} | {"score"}
    numeric |= {n for n in _SCALARS if not _FIELDS[n].startswith("str")}
    numeric -= {"seed", "schema", "memory_kind"}
    table = pd.DataFrame({n: pd.Series(c, dtype=float if n in numeric else None) for n, c in columns.items()})
    first = [n for n in ("task", "model", "method", "seed", "status", "score", *COSTS) if n in columns]
    table = table[[*first, *(n for n in names if n not in first)]]
    table.attrs["problems"] = problems
    return table
