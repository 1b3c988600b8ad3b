"""What is wrong with rows before a model sees them: an error where they cannot be used, a count where they can."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.base import Task


def check(task: Task, splits: dict[str, Dataset]) -> dict[str, int]:
    """Counts for the record: `empty`, rows with an empty text, which are used as they are.

    Raises ValueError, with split and column, for text that is not UTF-8 or missing, and for a label of the wrong type
    or outside the set.
    """
    counts: Counter[str] = Counter()
    for split, rows in splits.items():
        owner = task.task_of(split)
        where = f"{owner.path}/{owner.name}: {split}"
        for column in owner.columns():
            if getattr(rows.features[column], "dtype", None) == "string":
                counts["empty"] += _empty(rows, column, where)
        if (target := owner.target()) is not None:
            _classes(owner, rows, target, split)
        elif "float" in str(getattr(rows.features.get(getattr(owner, "label", "")), "dtype", "")):
            _values(rows, owner.label, where)  # type: ignore[attr-defined]
        owner.check(rows, split)
    return dict(counts)


def _empty(rows: Dataset, column: str, where: str) -> int:
    """How many texts are empty or blank."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = rows.with_format("arrow")[column][:]
    if isinstance(texts, pa.ChunkedArray) and texts.null_count:
        raise ValueError(f"{where}: {texts.null_count} rows have no {column!r} (null)")
    try:
        return int(pc.sum(pc.equal(pc.utf8_trim_whitespace(texts), "")).as_py() or 0)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: the column {column!r} holds text that is not UTF-8 ({error})") from error


def _classes(task: Task, rows: Dataset, target: str, split: str) -> None:
    """Raise ValueError unless each label is one of the task's classes 0, 1, ..."""
    kind = rows.features[target].dtype
    if "int" not in kind:
        raise ValueError(f"{task.path}/{task.name}: {split}: the labels in {target!r} are of type {kind}, not integers")
    found, count = sorted(set(rows[target])), getattr(task, "labels", math.inf)
    if found[0] is None or found[0] < 0:
        raise ValueError(
            f"{task.path}/{task.name}: the public split {task.splits[split]!r} has rows without a label, so it "
            f"cannot be {split}; cut it from another split, for example task.protocol=leakfree"
        )
    if found[-1] >= count:
        raise ValueError(
            f"{task.path}/{task.name}: {split} has the label {found[-1]}, outside the {count} classes of task.labels"
        )


def _values(rows: Dataset, column: str, where: str) -> None:
    if bad := sum(v is None or not math.isfinite(v) for v in rows[column]):
        raise ValueError(f"{where}: {bad} rows have a {column!r} that is no finite number")
