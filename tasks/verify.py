"""What a mirror holds against what is known: rows of its package or `source.json`, published sizes, columns, label sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import mirror, packages

if TYPE_CHECKING:
    from tasks.base import Task


def check(root: Path) -> Iterator[tuple[str, dict[str, int], list[str]]]:
    """For each config in the mirror `root`: its name, rows per split, and what is wrong with it."""
    for folder in sorted({file.parent for file in root.glob("*/*/*/*.parquet")}):
        name = f"{'/'.join(folder.parts[-3:-1])} {folder.name}"
        try:
            rows = mirror.verify(folder, of_package(folder))
        except mirror.Mismatch as error:
            yield name, {}, [str(error)]
        else:
            yield name, rows, differences(folder, rows, _users(folder))


def _users(folder: Path) -> dict[str, Task]:
    """The tasks that name this data set in their own file."""
    import tasks

    path, config = "/".join(folder.parts[-3:-1]), folder.name
    said = tasks.stated().items()
    found = [t for t, v in said if v.get("path") == path and (v.get("name") or "default") == config]
    return {name: tasks.compose_task(name) for name in found}


def differences(folder: Path, rows: Mapping[str, int], users: Mapping[str, Task]) -> list[str]:
    """How `folder`, with `rows` per split, differs from what the tasks that read it (by their names) expect.

    The rows of a package may be fewer than the published ones; the package's own table knows how many.
    """
    counted = of_package(folder) is None
    found: dict[str, list[str]] = {}
    for name, task in users.items():
        for split in dict.fromkeys(task.splits.values()):
            for problem in _of_split(folder, rows, task, split, counted):
                found.setdefault(problem, []).append(name)
    return [f"{', '.join(names)}: {problem}" for problem, names in found.items()]


def of_package(folder: Path) -> Mapping[str, int] | None:
    """The rows per split that the package table promises; None for rows from elsewhere."""
    if (mirror.stated(folder) or {}).get("kind") != "package":
        return None
    source = packages.find("/".join(folder.parts[-3:-1]), folder.name)
    return source.rows if source else None


def _of_split(folder: Path, rows: Mapping[str, int], task: Task, split: str, counted: bool) -> Iterator[str]:
    import pyarrow.parquet as pq

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        yield f"no split {split!r}, only {', '.join(rows)}"
        return
    if counted and (published := task.sizes.get(split, rows[split])) != rows[split]:
        yield f"{rows[split]:,} rows in {split}, published are {published:,}"
    columns = pq.read_schema(files[0]).names
    missing = [column for column in task.columns() if column not in columns]
    if missing:
        yield f"no column {', '.join(missing)} in {split}, only {', '.join(columns)}"
    elif (target := task.target()) and (count := getattr(task, "labels", None)):
        yield from _labels(files, target, count, split)


def _labels(files: list[Path], column: str, count: int, split: str) -> Iterator[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found = {label for file in files for label in pc.unique(pq.read_table(file, columns=[column])[column]).to_pylist()}
    known = set(range(count))
    if found - known:
        yield f"labels in {split} outside the {count} classes 0 to {count - 1}: {sorted(found - known, key=str)}"
    if split == "train" and known - found:
        yield f"classes without a row in {split}: {sorted(known - found)}"
