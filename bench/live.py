"""Bytes that live at once in one training step, counted operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.storage import gradient_bytes, model_tensors, optimizer_bytes, storages, weight_bytes


class Live(TorchDispatchMode):
    """While active, counts `bytes`: the model's tensors, and whatever operations make, until nothing refers to it; `peak`: their most.

    What an operation takes for itself while it computes is not seen, nor what an allocator rounds up.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()
        self._aside = False
        self._add(*model_tensors(model))

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.prim.device.default:  # fake tensors are asked twice in every operation
            return args[0].device
        found = operation(*args, **(kwargs or {}))
        if not self._aside:
            self._add(*(t for t in tree_leaves(found) if isinstance(t, Tensor)))
        return found

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is made inside the block lies in other memory: it is not counted."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def _add(self, *tensors: Tensor) -> None:
        for storage in (s for t in tensors for s in storages(t)):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.bytes)

    def _gone(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.bytes -= size


def kinds(model: nn.Module, method: Any, lr: float = 1e-3) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state after a step on a model whose tensors have no numbers."""
    optimizer = method.optimizer(model, lr, 0.0)

    def closure() -> Tensor:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad and method.backward else None
        return torch.zeros(())

    if method.backward:
        optimizer.step(closure)
        method.after_step(model, 0, 100)
    gradients = gradient_bytes(model) if method.backward else 0
    return {"weights": weight_bytes(model), "gradients": gradients, "optimizer": optimizer_bytes(optimizer)}
