"""Tensors of which each rank holds a part (`sharding.py` makes them): the part, the whole, and back. Others are as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from bench import distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def parted(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank holds a part alone."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; along the first dimension, and empty where that is too short."""
    return tensor.to_local() if parted(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts, in the machine's memory: each rank must ask. A tensor without parts stays where it is."""
    return tensor.full_tensor().cpu() if parted(tensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, which each rank has whole, in such parts as `other`."""
    if not parted(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    parts = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return parts.clone()  # a view until here, which would keep the whole


def unscaled(parameters: Sequence[nn.Parameter], scale: float) -> bool:
    """Take a loss scale out of the gradients again; whether they are finite, on all ranks."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, 1 / scale)
    return not distributed.total(not all(torch.isfinite(g).all() for g in gradients))


def clip(parameters: Sequence[nn.Parameter], most: float) -> None:
    """torch's `clip_grad_norm_`, where all parameters are in parts or none is: the norm is that of all ranks' gradients."""
    norm = nn.utils.get_total_norm([local(p.grad) for p in parameters if p.grad is not None])
    if any(map(parted, parameters)):
        square = norm.float().square()
        distributed.add_up([square])
        norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
