"""Weights shared out over torchrun's processes (`shard=true`), for a model that one device cannot hold.

Each rank keeps its part of every frozen parameter, and a block is whole only while it computes (`fully_shard` of torch, which
is FSDP2). What a method trains stays whole on every rank, so that optimizers, gradients, checkpoints and counts are those of
`bench/distributed.py`; but where the method is `shardable`, as full fine-tuning is, that is shared out too, with its
gradients and the optimizer's state (`bench/parts.py`). Gathering a block takes all ranks: `in_step` makes them call the model
equally often.
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
    from bench.prepare import Prepared
    from methods.base import Batch


def shards(config: Config) -> bool:
    """Whether the run that this process takes part in shares out its weights."""
    return config.shard and distributed.size() > 1


def shard(ready: Prepared) -> None:
    """Share out the weights of a model in the machine's memory, block by block; what stays whole goes to its device.

    Raises ValueError where nothing in the blocks can be shared out, or no block is known.
    """
    model, before = ready.model, dict(ready.model.named_parameters())
    blocks = blocks_of(model)
    kept = set() if ready.method.shardable else {p for p in before.values() if trains(p)}
    if not any(p not in kept for block in blocks for p in block.parameters()):
        unknown = "no block is known by name (methods/architectures.py)"
        raise ValueError(
            f"shard=true shares out the weights of blocks, and here {'the method needs all of them whole' if blocks else unknown}: "
            "leave out shard=true, or take full_ft, or a method that leaves the pretrained weights frozen, such as lora"
        )
    _fully_shard([*blocks, model], ready.device, kept)
    for name, p in model.named_parameters():
        if p in kept:
            p.data = p.data.to(ready.device)
        else:  # a new parameter, that knows what the old one did: how many weights are packed in it
            vars(p).update(vars(before[name]))
    ready.head = {id(p) for name, p in model.named_parameters() if id(before[name]) in ready.head}
    model.spare = {k: v.to(ready.device) for k, v in ready.few().items()}  # type: ignore[assignment]


def _fully_shard(modules: list[nn.Module], device: torch.device, kept: set[nn.Parameter]) -> None:
    """Share out the parameters of each module, the model last, but `kept`; gradients are added up in single precision at least."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (distributed.size(),))
    trained = [p.dtype for p in modules[-1].parameters() if trains(p) and p not in kept]
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(trained[0], torch.float32) if trained else None)
    for module in modules:
        shared = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=kept)
        shared.set_gradient_divide_factor(1.0)  # a loss is weighted by its share of the whole batch already
        shared.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to divide by one


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
