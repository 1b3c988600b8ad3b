"""What the frozen prefix makes of each row, computed once per split and kept on disk: `train.features=auto`.

From the first step on the prefix is not run: its last block returns the kept rows of the batch, and so does each whose
output a network beside it reads (`lst`: as many hidden states of every position as it has side blocks, one more for
images); the others return what they are given. The result is the same up to rounding in a batch of another shape (1e-6
of a loss in fp32); what a step, an evaluation and the whole run take is not, so the record keeps these numbers apart
(`measure.mark_cached`).

The cache is that of encoded text, with its folder, its bound and its checksums. A file is named by all that decides its
content: rows and their encoding, weights and configuration, precision, device, versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bench.encoded_cache import capacity, digest, stored
from bench.environment import environment
from bench.features_compute import Computing, Plan
from bench.lookup import NAME, Lookup
from bench.storage import model_tensors, storages
from bench.train import Stop
from methods.base import trains

if TYPE_CHECKING:
    import pyarrow as pa

    from bench.clock import Phases
    from bench.config import Config
    from bench.prepare import Prepared

log = logging.getLogger("bench")


class Features:
    """The stored features of a split; `packed`: given without padding."""

    def __init__(self, table: pa.Table, packed: bool):
        self.table = table
        self.plan = Plan(**json.loads(table.schema.metadata[b"plan"]))
        self.packed = packed and not self.plan.first

    @cached_property
    def _chunks(self) -> list[tuple[Any, Any]]:
        """Offsets and bytes of each chunk, straight out of the map."""
        found = []
        for chunk in self.table[NAME].chunks:
            _, offsets, values = chunk.buffers()
            found.append((np.frombuffer(offsets, np.int64), np.frombuffer(values, np.uint8)))
        return found

    def batch(self, indices: list[int]) -> Tensor:
        """As `Plan.read`."""
        return self.plan.read([self._bytes(i) for i in indices], self.packed)

    def row(self, i: int) -> dict[str, Any]:
        """Row `i` as it was encoded, but zeros for pixels, which nobody reads any more."""
        zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in self.plan.arrays.items()}
        return zeros | json.loads(self.table["row"][i].as_py())

    def _bytes(self, i: int) -> Any:
        chunk, k = divmod(i, self.plan.chunk)
        offsets, values = self._chunks[chunk]
        return values[offsets[k] : offsets[k + 1]]


def use(ready: Prepared, config: Config, phases: Phases, stop: Stop) -> dict[str, Any] | None:
    """Give every split its features, so that the run reads them from now on; say what is kept, for the record.

    None, with a line in the log, where nothing can be kept. Raises Interrupted.
    """
    if ready.prefix is None:
        return _off("nothing below what is trained is frozen and left as it is by the method")
    at = Computing(ready, Lookup(ready.model, ready.prefix), config, stop)
    plan = at.plan()
    if plan is None:
        ends = ", ".join(ready.prefix.names[k - 1] for k in ready.prefix.read if k)
        return _off(f"what is trained reads more than the output of {ends}")
    splits = {s: e for s, e in ready.encoded.items() if s == "train" or e.task.collated}
    size = sum(plan.size(encoded) for encoded in splits.values())
    about = f"{size / 1e9:.2f} GB, {len(plan.kept)} hidden states of {'the first' if plan.first else 'each'} position,"
    if size > capacity():
        return _off(f"{about} are more than PARETUNE_ENCODED_GB allows ({capacity() / 1e9:g})")
    with phases(NAME):
        recipe = _recipe(ready, config, plan)
        tables = [stored(f"{NAME}-{recipe}-{e.key}", partial(at.reader, e, plan)) for e in splits.values()]
    if any(table is None for table in tables):
        return _off("they cannot be written")
    for encoded, table in zip(splits.values(), tables, strict=True):
        encoded.features = Features(table, ready.packed)
    log.info("features are kept: %s in place of frozen blocks", about)
    positions = "first" if plan.first else "all"
    return {"prefix": ready.prefix.names, "states": len(plan.kept), "positions": positions, "bytes": size}


def _recipe(ready: Prepared, config: Config, plan: Plan) -> str:
    """16 hex digits of all that decides a row's features but the row: weights as bytes, everything else in words."""
    weights = hashlib.sha256()
    trained = {id(p) for p in ready.model.parameters() if trains(p)}
    for tensor in model_tensors(ready.model):
        for storage in storages(tensor) if id(tensor) not in trained else ():
            weights.update(torch.empty(0, dtype=torch.uint8).set_(storage.cpu()).numpy().data)  # type: ignore[call-overload]
    assert ready.prefix is not None
    parts = {
        "weights": weights.hexdigest(),
        "config": ready.model.config.to_dict(),  # type: ignore[operator, union-attr]
        "names": ready.prefix.names,
        "plan": vars(plan),
        "precision": config.train.precision,
        "versions": [torch.__version__, version("transformers"), environment(ready.device)["device"]],
    }
    return digest(parts)


def _off(reason: str) -> dict[str, Any] | None:
    log.info("no features are kept: %s", reason)
    return None
