"""What autograd keeps for the backward pass, in the host's memory: `train.offload=activations`.

A storage that is kept is copied once, whatever views of it are, to pinned memory, and comes back where the backward pass
asks for it: the same numbers to the bit. What lies on the device anyway stays there (parameters, buffers, quantised
weights), and so does what is smaller than `SMALLEST`. With gradient checkpointing the inputs of blocks go to the host, and
what a block computes again does not. Copies take their turn in the stream that computes: nothing overlaps with them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import deterministic
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.storage import model_tensors, storages

SMALLEST = 2**16  # bytes; of fewer the copy takes less time than to ask for it (some µs, 25 GB/s)


def keeping(model: nn.Module, offload: str) -> AbstractContextManager[Any]:
    """The context of a forward pass: autograd keeps what it needs as `train.offload` says."""
    if offload == "none":
        return nullcontext()
    away = Offload(model)
    return saved_tensors_hooks(away.pack, away.unpack)


def check(offload: str, device: torch.device) -> None:
    """Raise ValueError where there is no other memory than the host's."""
    if offload != "none" and device.type == "cpu":
        raise ValueError(
            f"train.offload={offload} moves memory of a GPU to the host, and device=cpu computes in the host's: "
            "leave it out (train.offload=none), or take device=cuda"
        )


class Offload:
    """The pair of hooks for one forward pass of `model`."""

    def __init__(self, model: nn.Module):
        self.own = {s._cdata for t in model_tensors(model) for s in storages(t)}
        self.copies: WeakValueDictionary[tuple[int, int], Copy] = WeakValueDictionary()

    def pack(self, tensor: Tensor) -> Tensor | View:
        """What autograd keeps in place of `tensor`: itself, or a view of a copy."""
        if not _plain(tensor):
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST or storage._cdata in self.own:
            return tensor
        state = storage._cdata, tensor._version  # changed in place it is copied again
        copy = self.copies.get(state) or self.copies.setdefault(state, Copy(storage, tensor.device))
        return View(copy, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    @staticmethod
    def unpack(kept: Tensor | View) -> Tensor:
        """The tensor that was kept, on its device."""
        if isinstance(kept, Tensor):
            return kept
        storage = kept.copy.back()
        return torch.empty(0, dtype=kept.dtype, device=kept.copy.device).set_(storage, *kept[2:])  # type: ignore[call-overload]


class Copy:
    """The bytes of a storage in the host's memory, as long as something needs them."""

    def __init__(self, storage: torch.UntypedStorage, device: torch.device):
        self.origin = StorageWeakRef(storage)  # while this lives, no other storage is taken for it
        self.there: StorageWeakRef | None = None  # the device's, while the backward pass uses it
        self.device = device
        self.bytes = _room(storage.nbytes(), pinned=device.type == "cuda")
        self.bytes.copy_(torch.empty(0, dtype=torch.uint8, device=device).set_(storage), non_blocking=True)

    def back(self) -> torch.UntypedStorage:
        """A storage with these bytes on the device; one for all who ask while it lives."""
        if self.there and (found := torch.UntypedStorage._new_with_weak_ptr(self.there.cdata)) is not None:
            return found
        found = self.bytes.to(self.device, non_blocking=True, copy=True).untyped_storage()
        self.there = StorageWeakRef(found)
        return found


class View(NamedTuple):
    """A tensor of a copied storage."""

    copy: Copy
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _plain(tensor: Tensor) -> bool:
    """Whether offset, size and stride say which bytes of one storage the tensor is."""
    whole = tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)
    return whole and not tensor.is_conj() and not tensor.is_neg()


def _room(size: int, *, pinned: bool) -> Tensor:
    """`size` bytes of the host's memory, unwritten also where deterministic runs fill what is new."""
    settings: Any = deterministic
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    finally:
        settings.fill_uninitialized_memory = fills
