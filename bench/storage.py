"""Bytes of tensors by storage: exact, each storage once and whole, whatever views look at it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.parts import local


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages behind a tensor: one, those of a sparse tensor's or a quantised wrapper's parts, or of this rank's shard."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [
            getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]
        ]  # a shard's also name its device mesh
        return [s for part in parts if isinstance(part, Tensor) for s in storages(part)]
    if tensor.layout is torch.sparse_coo:
        return [*storages(tensor._indices()), *storages(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [s for t in (tensor.crow_indices(), tensor.col_indices(), tensor.values()) for s in storages(t)]
    return [tensor.untyped_storage()]


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what a quantiser hangs on its packed parameters (scales, code books)."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from _tensors(vars(tensor), set())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in nested containers and plain objects; models and functions are not entered."""
    if isinstance(value, nn.Module) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _tensors(k, seen)
            yield from _tensors(v, seen)
    elif isinstance(value, (list, tuple, set)):
        for v in value:
            yield from _tensors(v, seen)
    elif hasattr(value, "__dict__") or dataclasses.is_dataclass(value):
        yield from _tensors(vars(value), seen)


def _bytes(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    excluded = {s._cdata for t in without for s in storages(t)}
    return sum({s._cdata: s.nbytes() for t in tensors for s in storages(t) if s._cdata not in excluded}.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, by storage: tied weights once, packed low-bit weights as packed."""
    return _bytes(model_tensors(model))


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the trained parameters' gradients: as they lie there, or as large as the parameter where none lies yet."""
    trained = [p for p in model.parameters() if p.requires_grad]
    here = _bytes(p.grad for p in trained if p.grad is not None)
    return here + sum(local(p).numel() * p.element_size() for p in trained if p.grad is None)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that an optimizer holds (state, projections, inner optimizers), less parameters and gradients."""
    held = list(_tensors(vars(optimizer), set()))
    parameters = [t for t in held if isinstance(t, nn.Parameter) or (t.grad_fn is None and t.requires_grad)]
    parameters += [p for group in optimizer.param_groups for p in group["params"]]
    return _bytes(held, without=[*parameters, *(p.grad for p in parameters if p.grad is not None)])
