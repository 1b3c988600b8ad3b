"""python -m bench.collect RUNS -o results.parquet: all records of a folder in one file, without loss.

One row per run. Columns: the fields of the record, in its order, those with parts as JSON text; then every number of
`metrics`, `memory`, `time`, `flops`, `energy` and `spectra` once more as a column of its own. The type of a column follows
from its name alone. A second call reads what is new or has changed; `python -m analysis` takes
the file in place of the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from bench.record import Record, replacing

NUMBERS = ("metrics", "memory", "time", "flops", "energy", "spectra")
FILE = ("_path", "_modified", "_size")  # of the record file, to see whether it has changed
_TYPES = {"str": "string", "int": "int64", "float": "float64", "dict": "string", "list": "string"}
_FIELDS = {f.name: _TYPES[str(f.type).split("[")[0].split(" ")[0]] for f in dataclasses.fields(Record)}
Row = dict[str, Any]


def collect(folder: Path, target: Path) -> tuple[int, int, list[tuple[str, str]]]:
    """Write `target`; return how many rows it has, how many were read anew, and (path, problem) of what is no record.

    Raises FileNotFoundError where the folder is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that runs were written to (results=...)")
    known = {row["_path"]: row for row in rows(target)} if target.exists() else {}
    found: list[Row] = []
    problems: list[tuple[str, str]] = []
    read = 0
    for path in sorted(folder.glob("**/record.json")):
        try:
            stamp = _stamp(path, folder)
            row = known.get(stamp["_path"])
            if row is None or any(row[k] != v for k, v in stamp.items()):
                row, read = flat(Record.load(path)) | stamp, read + 1
            found.append(row)
        except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
            problems.append((str(path), f"{type(error).__name__}: {error}"))
    _write(found, target)
    return len(found), read, problems


def _stamp(path: Path, folder: Path) -> Row:
    seen = path.stat()
    return {"_path": str(path.parent.relative_to(folder)), "_modified": seen.st_mtime_ns, "_size": seen.st_size}


def flat(record: Record) -> Row:
    """A record as one row."""
    values = dataclasses.asdict(record)
    row = {k: json.dumps(v, sort_keys=True) if isinstance(v, (dict, list)) else v for k, v in values.items()}
    for name in NUMBERS:
        row |= {f"{name}_{key}": None if v is None else float(v) for key, v in values[name].items()}
    return row


def rows(path: Path) -> list[Row]:
    """The rows of a collected file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def records(path: Path) -> list[tuple[str, Record]]:
    """(folder, record) of every run in a collected file, as the folder had them."""
    found = []
    for row in rows(path):
        values = {name: row[name] for name in _FIELDS}
        parts = {f.name for f in dataclasses.fields(Record) if str(f.type).startswith(("dict", "list"))}
        found.append((row["_path"], Record(**{k: json.loads(v) if k in parts else v for k, v in values.items()})))
    return found


def _write(found: list[Row], target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    numbers = sorted({key for row in found for key in row if key not in _FIELDS and key not in FILE})
    kinds = _FIELDS | dict.fromkeys(numbers, "float64") | {"_path": "string", "_modified": "int64", "_size": "int64"}
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in kinds.items()])
    with replacing(target) as part:
        table = pyarrow.table({k: [row.get(k) for row in found] for k in kinds}, schema=schema)
        pyarrow.parquet.write_table(table, part)


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.collect", description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder of results, and what lies below it")
    parser.add_argument("-o", "--output", type=Path, default=Path("results.parquet"))
    args = parser.parse_args()
    try:
        total, read, problems = collect(args.runs, args.output)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, problem in problems:
        print(f"left out: {path} ({problem})", file=sys.stderr)
    print(f"{args.output}: {total} records, {read} of them read now, {len(problems)} left out")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
