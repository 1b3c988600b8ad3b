"""Batches of a split: which rows come together and in which order, as a pure function of the seed and the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from bench.distributed import share

if TYPE_CHECKING:
    from bench.encoded import Encoded
    from methods.base import Batch


class TrainBatches:
    """The endless training batches: `batches[k]` is that of optimizer step k, whatever came before.

    Each epoch is a fresh permutation of all rows. Within `buckets` consecutive batches rows are sorted by length, so
    that little is padded; the order of batches is shuffled again, so that length does not follow time.
    """

    def __init__(self, encoded: Encoded, *, batch_size: int, seed: int, buckets: int = 50):
        if not len(encoded):
            raise ValueError("the train split has no rows")
        self.encoded, self.batch_size, self.seed, self.buckets = encoded, batch_size, seed, buckets
        self.per_epoch = math.ceil(len(encoded) / batch_size)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """Row indices of step `step`."""
        epoch, k = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][k]

    def __getitem__(self, step: int) -> Batch:
        return self.encoded.batch(self.indices(step))

    def elements(self, step: int, *, packed: bool = False) -> int:
        """`elements` of step `step`'s batch, which is not made."""
        lengths = [self.encoded.length(i) for i in self.indices(step)]
        return sum(lengths) if packed else len(lengths) * max(1, *lengths)

    def micro(self, step: int, accumulate: int) -> list[Batch]:
        """Step `step` in `accumulate` parts of nearly equal numbers of rows; of several devices, this one's rows."""
        rows = self.indices(step)
        size = math.ceil(len(rows) / accumulate)
        parts = [share(rows[i : i + size]) for i in range(0, len(rows), size)]
        return [self.encoded.batch(part) for part in parts if part]

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while True:
            yield self[step]
            step += 1

    def _order(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self.encoded), generator=generator).tolist()
        if self.buckets > 1:
            pool = self.batch_size * self.buckets
            pools = [sorted(rows[i : i + pool], key=self.encoded.length) for i in range(0, len(rows), pool)]
            rows = [i for p in pools for i in p]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in order]


def elements(batch: Batch, *, packed: bool = False) -> int:
    """Tokens of a batch, its padding included unless it is packed; images count as one."""
    if packed:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else len(batch["labels"])


def longest(encoded: Encoded, batch_size: int) -> Batch:
    """The batch of the longest rows: what decides the memory of a training step."""
    rows = sorted(range(len(encoded)), key=encoded.length, reverse=True)[:batch_size]
    return encoded.batch(rows)


def eval_batches(encoded: Encoded, batch_size: int) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
    """Every row once, longest first: (batch, the rows as they are in the data set). Of several devices, this one's rows."""
    order = share(sorted(range(len(encoded)), key=encoded.length, reverse=True))
    for i in range(0, len(order), batch_size):
        part = order[i : i + batch_size]
        yield encoded.batch(part), [encoded.rows[j] for j in part]
