"""Frozen weights shared out over torchrun's processes (`shard=true`), for a model that one device cannot hold.

Each rank keeps its part of every frozen parameter, and a block is whole only while it computes (`fully_shard` of torch, which
is FSDP2). What a method trains stays whole on every rank, so that optimizers, gradients, checkpoints and counts are those of
`bench/distributed.py`. Gathering a block takes all ranks: `in_step` makes them call the model equally often.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench import distributed
from bench.prefix import blocks_of
from methods.base import trains

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from bench.config import Config
    from methods.base import Batch


def shards(config: Config) -> bool:
    """Whether the run that this process takes part in shares out its frozen weights."""
    return config.shard and distributed.size() > 1


def shard(model: nn.Module, device: torch.device, spare: Batch) -> None:
    """Share out what `model` (in the machine's memory) keeps frozen, block by block; what is trained goes to `device`.

    spare: any rows, for a rank that must call the model while others have rows left. Raises ValueError where no block has
    frozen weights, or none is known.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks, before = blocks_of(model), dict(model.named_parameters())
    trained = {p for p in before.values() if trains(p)}
    if not any(p not in trained for block in blocks for p in block.parameters()):
        raise ValueError(
            "shard=true shares out the frozen weights of blocks, and here "
            + ("all of them are trained" if blocks else "no block is known by name (methods/architectures.py)")
            + ": leave out shard=true, or take a method that leaves the pretrained weights frozen, such as lora"
        )
    mesh = init_device_mesh(device.type, (distributed.size(),))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for name, p in model.named_parameters():
        if p in trained:
            p.data = p.data.to(device)
        else:  # a new parameter, that knows what the old one did: how many weights are packed in it
            vars(p).update(vars(before[name]))
    model.spare = {k: v.to(device) for k, v in spare.items()}  # type: ignore[assignment]


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Inside the block every call of a sharded model is one of all ranks; who is done calls it on, for the others.

    Before each call the ranks agree that there is one. Outside a call one rank may fail alone, as in `together`; in the
    middle of one it cannot be helped, and its process ends, and torchrun with it.
    """
    if (spare := vars(model).get("spare")) is None:
        yield
        return
    midway = [False]  # in a call, or before its backward pass

    def begin(*_: object) -> None:
        distributed.total(1)
        midway[0] = True

    def end(*_: object) -> None:
        midway[0] = torch.is_grad_enabled()

    hooks = [model.register_forward_pre_hook(begin, prepend=True), model.register_forward_hook(end)]
    try:
        yield
    except Exception:
        if midway[0]:
            raise
        _keep_up(model, spare, hooks)
        raise
    _keep_up(model, spare, hooks)


def _keep_up(model: nn.Module, spare: Batch, hooks: list[RemovableHandle]) -> None:
    """Take part in the other ranks' calls until all are done."""
    for hook in hooks:
        hook.remove()
    while distributed.total(0):
        loss = model(**spare).loss
        if torch.is_grad_enabled():
            (loss * 0).backward()
