"""How little of each row's features must be kept, and all of them computed, a chunk at a time.

A row's bytes are its states one behind the other, (states, positions, width): in a batch each state is a tensor without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bench.lookup import NAME, Lookup
from bench.train import Stop, autocast, to_device
from bench.untouched import perturbed, untouched

if TYPE_CHECKING:
    import pyarrow as pa

    from bench.config import Config
    from bench.encoded import Encoded
    from bench.prepare import Prepared

CHUNK, MEMORY = 512, 2**28  # rows that are in memory at once, and about their bytes at most
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # relative; of a half precision 2e-2


@dataclass
class Plan:
    """What is kept of each row: which states, of its first position or all, and as what."""

    first: bool
    flat: bool
    positions: int  # of an image, or of the longest row that was tried
    kept: list[int]  # states of the prefix (`Prefix.read`)
    width: int  # of each
    dtype: str
    arrays: dict[str, list[int]]  # shapes of what is not made again: pixels

    def size(self, encoded: Encoded) -> int:
        """Bytes of a split's features."""
        if self.first or self.flat:
            return len(encoded) * self._each
        return sum((encoded.length(i) or self.positions) for i in range(len(encoded))) * self._each

    @property
    def chunk(self) -> int:
        """Rows that are in memory at once."""
        row = self._each * (1 if self.first or self.flat else self.positions)
        return max(1, min(CHUNK, MEMORY // row))

    @property
    def _each(self) -> int:
        """Bytes of a position."""
        return len(self.kept) * self.width * getattr(torch, self.dtype).itemsize

    def write(self, states: Tensor, lengths: list[int]) -> list[bytes]:
        """The bytes of each row of (states, batch, positions, width), or of (1, batch, width) where `flat`."""
        if self.flat:
            rows = list(states[0])
        else:
            ends = [1 if self.first else length or None for length in lengths]
            rows = [states[:, i, :end] for i, end in enumerate(ends)]
        return [row.contiguous().cpu().view(torch.uint8).numpy().tobytes() for row in rows]

    def read(self, rows: list[Any], packed: bool) -> Tensor:
        """Rows of bytes as (states, rows, most positions among them, width), zeros behind shorter rows.

        One row behind the other, (states, tokens, width), where `packed`; (rows, width) where `flat`.
        """
        if self.flat:
            whole = np.stack(rows)
        else:
            parts = [row.reshape(len(self.kept), -1, self._each // len(self.kept)) for row in rows]
            whole = np.concatenate(parts, 1) if packed else _padded(parts)
        return torch.from_numpy(whole).view(getattr(torch, self.dtype))

    def tries(self, states: Tensor, lengths: list[int], packed: bool) -> Iterator[Tensor]:
        """What the network may be given for `states`: with NaN wherever it should not read, then what is kept."""
        if self.first:
            yield torch.cat([states[:, :, :1], torch.full_like(states[:, :, 1:], torch.nan)], 2)
        rows = [np.frombuffer(row, np.uint8) for row in self.write(states, lengths)]
        yield self.read(rows, packed and not self.first).to(states.device)


def _padded(parts: list[Any]) -> Any:
    """(states, rows, most positions, bytes) of arrays (states, positions, bytes)."""
    states, _, size = parts[0].shape
    whole = np.zeros((states, len(parts), max(part.shape[1] for part in parts), size), np.uint8)
    for i, part in enumerate(parts):
        whole[:, i, : part.shape[1]] = part
    return whole


class Computing:
    """Runs the prefix of a prepared model on rows."""

    def __init__(self, ready: Prepared, lookup: Lookup, config: Config, stop: Stop):
        self.ready, self.lookup, self.stop = ready, lookup, stop
        self.precision, self.size = config.train.precision, config.train.eval_batch_size

    def plan(self) -> Plan | None:
        """The least that suffices on the longest row, alone and beside the shortest; None where nothing does."""
        encoded = self.ready.encoded["train"]
        order = sorted(range(len(encoded)), key=encoded.length)
        with untouched(self.ready.model), torch.no_grad(), perturbed(self.ready.model):
            for plan in self._plans(encoded, order[-1]):
                if all(self._suffices(plan, encoded, rows) for rows in ([order[-1]], [order[0], order[-1]])):
                    return plan
        return None

    def _plans(self, encoded: Encoded, i: int) -> list[Plan]:
        row = encoded[i]
        arrays = {name: list(value.shape) for name, value in row.items() if isinstance(value, np.ndarray)}
        self.lookup.kept = [
            k for k in self.lookup.prefix.read if k or arrays
        ]  # text is embedded again, pixels are not there
        states = self._states(self._batch(encoded, [row]))
        if len({(s.shape, s.dtype) for s in states}) > 1:
            return []
        hidden = states[0]
        dtype, positions = str(hidden.dtype).removeprefix("torch."), hidden.shape[1]
        about: Any = dict(kept=self.lookup.kept, width=hidden.shape[-1], dtype=dtype, arrays=arrays)
        if hidden.dim() == 2 and len(states) == 1:
            return [Plan(first=False, flat=True, positions=1, **about)]
        if hidden.dim() != 3 or encoded.length(i) not in (0, positions):
            return []
        return [Plan(first=first, flat=False, positions=positions, **about) for first in (True, False)]

    def _suffices(self, plan: Plan, encoded: Encoded, indices: list[int]) -> bool:
        """Whether loss and, of one row, logits are the same where the network reads `plan`'s features and no pixels."""
        batch, lengths = self._batch(encoded, [encoded[i] for i in indices]), [encoded.length(i) for i in indices]
        blind = batch | {name: torch.zeros_like(batch[name]) for name in plan.arrays}
        states, expected = torch.stack(self._states(batch)), self._run(batch)
        names = ("loss", "logits") if len(indices) == 1 else ("loss",)
        close = TOLERANCE.get(states.dtype if self.precision == "fp32" else torch.bfloat16, 2e-2)
        for features in plan.tries(states, lengths, self.ready.packed):
            found = self._run(blind | {NAME: features})
            if not all(torch.allclose(found[n], expected[n], rtol=close, atol=close) for n in names):
                return False
        return True

    def reader(self, encoded: Encoded, plan: Plan) -> pa.RecordBatchReader:
        """The features of all rows, in chunks of `plan.chunk`."""
        import pyarrow as pa

        fields = [(NAME, pa.large_binary()), ("row", pa.large_string())]
        schema = pa.schema(fields, metadata={"plan": json.dumps(asdict(plan))})

        def chunks() -> Iterator[pa.RecordBatch]:
            for start in range(0, len(encoded), plan.chunk):
                rows = range(start, min(start + plan.chunk, len(encoded)))
                found = self._chunk(encoded, plan, sorted(rows, key=encoded.length))
                yield pa.record_batch([list(column) for column in zip(*(found[i] for i in rows), strict=True)], schema)

        return pa.RecordBatchReader.from_batches(schema, chunks())

    def _chunk(self, encoded: Encoded, plan: Plan, indices: list[int]) -> dict[int, tuple[bytes, str]]:
        """Of each row the bytes of its features, and all but its pixels as JSON where it has any."""
        found = {}
        for part in (indices[k : k + self.size] for k in range(0, len(indices), self.size)):
            self.stop.check()
            rows = [encoded[i] for i in part]
            states = torch.stack(self._states(self._batch(encoded, rows)))
            kept = plan.write(states.cpu(), [encoded.length(i) for i in part])
            for i, row, values in zip(part, rows, kept, strict=True):
                facts = {k: v for k, v in row.items() if k not in plan.arrays} if plan.arrays else {}
                found[i] = values, json.dumps(facts)
        return found

    def _batch(self, encoded: Encoded, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return to_device(encoded.task.collate(rows, encoded.processor), self.ready.device)

    @torch.no_grad()
    def _states(self, batch: dict[str, Tensor]) -> list[Tensor]:
        self.ready.model.eval()
        with autocast(self.precision, self.ready.device):
            return self.lookup.compute(batch)

    @torch.no_grad()
    def _run(self, batch: dict[str, Tensor]) -> Any:
        self.ready.model.eval()
        with autocast(self.precision, self.ready.device):
            return self.ready.model(**batch)
