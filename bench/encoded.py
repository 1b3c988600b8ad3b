"""Rows of a split as model inputs: text is encoded once and shared by all runs, images are encoded each time."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bench.encoded_cache import fingerprint, recipe, shared

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from bench.features import Features
    from methods.base import Batch
    from tasks import Rows, Task

log = logging.getLogger("bench")
CHUNK = 1000  # rows that are Python objects at once while a split is encoded
UNBOUNDED = 10**9  # tokens


class Encoded:
    """Rows of one split as model inputs, each a dict of lists and numbers (of an image: an array).

    `key` names the rows as they are encoded: in the cache, where they are text; without one they are encoded in this process and kept in memory.
    """

    def __init__(self, rows: Dataset, task: Task, processor: Any, key: str | None = None):
        self.rows, self.task, self.processor, self.key = rows, task, processor, key
        self.text = task.kind != "image"
        self.features: Features | None = None  # that batches carry; see `features.py`

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if self.text:
            return {name: value(i) for name, value in self._columns.items()}
        return self.task.encode(self.rows[i], self.processor) if self.features is None else self.features.row(i)

    def length(self, i: int) -> int:
        """Tokens of row `i`; 0 for images, which all have the same size."""
        return self._lengths[i] if self.text else 0

    def batch(self, indices: list[int]) -> Batch:
        """The rows `indices` as one padded batch of tensors."""
        batch = self.task.collate([self[i] for i in indices], self.processor)
        return batch if self.features is None else batch | {"features": self.features.batch(indices)}

    @property
    def truncated(self) -> int:
        """Rows that lost tokens to the task's or the model's `max_length`; 0 for images."""
        return int(self._table.schema.metadata[b"truncated"]) if self.text else 0

    @cached_property
    def _table(self) -> pa.Table:
        def encode() -> pa.Table:
            return encode_rows(self.rows, self.task, self.processor)

        return encode() if self.key is None else shared(self.key, encode)

    @cached_property
    def _columns(self) -> dict[str, Callable[[int], Any]]:
        return {name: _reader(self._table[name].chunk(0)) for name in self._table.column_names}

    @cached_property
    def _lengths(self) -> list[int]:
        return _lengths(self._table)


def encode_splits(rows: Rows, task: Task, processor: Any) -> dict[str, Encoded]:
    """Each split of `rows`, its text shared through the cache."""
    what, how = rows.source["fingerprints"], fingerprint(processor)
    owners = {split: task.task_of(split) for split in rows.splits}
    return {
        split: Encoded(part, owners[split], processor, f"{recipe(owners[split], how)}-{what[split]}")
        for split, part in rows.splits.items()
    }


def encode_rows(rows: Dataset, task: Task, processor: Any) -> pa.Table:
    """All rows as a table in one piece, lists of integers as int32; the number of truncated rows is in its metadata.

    Raises TypeError for a value that is no number, string or list: it would not come back as it was.
    """
    import pyarrow as pa

    parts: list[pa.Table] = []
    schema = None
    for start in range(0, len(rows), CHUNK):
        part = [task.encode(rows[i], processor) for i in range(start, min(start + CHUNK, len(rows)))]
        schema = schema or _schema(part)
        parts.append(pa.Table.from_pylist(part, schema=schema))
    table = pa.concat_tables(parts).combine_chunks() if parts else pa.table({"input_ids": []})
    return table.replace_schema_metadata({"truncated": str(_truncated(table, rows, task, processor))})


def _schema(rows: list[dict[str, Any]]) -> pa.Schema:
    import pyarrow as pa

    for name, value in rows[0].items():
        if not isinstance(value, (list, int, float, str)):
            raise TypeError(
                f"{name} of an encoded row is a {type(value).__name__}; give numbers, strings or lists of them"
            )
    found = pa.Table.from_pylist(rows).schema
    ids = pa.large_list(pa.int32())
    return pa.schema([f.with_type(ids) if f.type == pa.list_(pa.int64()) else f for f in found])


def _truncated(table: pa.Table, rows: Dataset, task: Task, processor: Any) -> int:
    """Rows that are longer where nothing bounds them; asked of those alone that are as long as they may be."""
    if getattr(task, "max_length", None) is None:
        return 0
    limit = min(task.max_length, processor.model_max_length)  # type: ignore[attr-defined]
    whole, free = dataclasses.replace(task, max_length=UNBOUNDED), copy.copy(processor)  # type: ignore[call-arg]
    free.model_max_length = UNBOUNDED
    full = [i for i, length in enumerate(_lengths(table)) if length >= limit]
    return sum(len(whole.encode(rows[i], free)["input_ids"]) > limit for i in full)


def _lengths(table: pa.Table) -> list[int]:
    import pyarrow.compute as pc

    return pc.list_value_length(table["input_ids"]).to_pylist() if len(table) else []


def _reader(column: Any) -> Callable[[int], Any]:
    """What gives value `i` of a column as plain Python; lists of integers straight out of the (mapped) buffers."""
    import pyarrow as pa

    if column.type != pa.large_list(pa.int32()) or column.null_count:
        return lambda i: column[i].as_py()
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
    return lambda i: values[offsets[i] : offsets[i + 1]].tolist()
