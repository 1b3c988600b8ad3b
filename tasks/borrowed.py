"""Rows of other tasks: training rows from elsewhere (GSM8K from MetaMathQA), and test sets scored beside a task's own.

A task's `other` maps a split to the task whose rows it takes, each row in that task's own templates: `train` replaces the
training rows; any other name is a split of its own, that task's public test split, scored once at the selected checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tasks import splits as cutting
from tasks.data import DataConfig, Public

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.base import Task

Found = tuple["dict[str, Dataset]", dict[str, Any]]


def borrow(task: Task, found: Public, splits: dict[str, Dataset], data: DataConfig) -> Found:
    """The rows of `task.other` by split, and where they came from. `found` and `splits` are the task's own.

    Real rows are never joined by generated ones. Raises MissingData where the task has real rows and another has not, and
    ValueError where training rows are known to be, or cannot be shown not to be, among those that the task is scored on.
    """
    data = dataclasses.replace(data, mode="standin" if found.source["standin"] else "real")
    out, sources = {}, {}
    for place, (split, other) in enumerate(task.other.items()):
        public = other.public(data)
        part = "train" if split == "train" else "test"
        rows = public.splits[other.splits[part]]
        keep = list(range(len(rows)))
        sources[split] = public.source | {"path": other.path, "name": other.name, "licence": other.licence}
        if split == "train":
            keep = _apart(task, other, public, splits)
            said = f"{len(rows) - len(keep)} of {len(rows)} rows made from rows of val or test"
            sources[split] |= {"left_out": said if other.made_from else "none"}
        offset = (len(cutting.SPLITS) + place) * cutting.STRIDE  # ids that no row of the task's own has
        ids = [offset + i for i in keep]
        chosen = cutting.subset(ids, (task if split == "train" else other).limit.get(part))
        out[split] = other.select(rows, [keep[k] for k in chosen], [ids[k] for k in chosen])
    return out, sources


def _apart(task: Task, other: Task, public: Public, splits: dict[str, Dataset]) -> list[int]:
    """Positions of the training rows that were made from no row of val or test."""
    rows = public.splits[other.splits["train"]]
    if other.made_from is None:
        shared = {data_name(other)} & set(task.overlaps) or {data_name(task)} & set(other.overlaps)
        if shared:
            raise ValueError(
                f"{data_name(other)} and {data_name(task)} share rows: never train on one and test on the other"
            )
        return list(range(len(rows)))
    held = {plain(v) for s in ("val", "test") for c in task.columns() for v in splits[s][c] if isinstance(v, str)}
    if public.source["standin"]:  # generated rows are of no row: let them say so of what the task trains and selects on
        texts = [*splits["val"][task.columns()[0]], *splits["train"][task.columns()[0]]]
        origin = [texts[i % len(texts)] for i in range(len(rows))]
    else:
        origin = list(rows[other.made_from])
    keep = [i for i, text in enumerate(origin) if plain(text) not in held]
    if len(keep) == len(rows):
        raise ValueError(
            f"{data_name(other)}: no row's {other.made_from!r} is a text of val or test, so that it cannot be shown which "
            "rows were made from them"
        )
    return keep


def data_name(task: Task) -> str:
    """The name of a task's data set in `overlaps`: hub id and configuration."""
    return f"{task.path}/{task.name or 'default'}"


def plain(text: Any) -> str:
    """Letters and digits alone, in lower case: equal for texts that differ in spaces, case and punctuation."""
    return "".join(c for c in str(text).lower() if c.isalnum())
