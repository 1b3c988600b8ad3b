"""What the processes of torchrun say to one another: sums of tensors, bytes of all, a value of the first. No pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**22  # elements of tensors that travel together


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all ranks, in single precision at least."""
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in bucket])
        dist.all_reduce(flat)
        for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(part.view_as(t))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors with at most BUCKET elements together; a larger one alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in [*bucket, tensor]) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def tell(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rank 0's value (plain JSON), on every rank."""
    content = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    length = torch.tensor(len(content))
    dist.broadcast(length, 0)
    data = torch.frombuffer(bytearray(content.ljust(int(length))), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(data.numpy().tobytes())


def gather(content: bytes) -> list[bytes]:
    """The bytes of every rank, in their order."""
    lengths = [torch.tensor(0) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor(len(content)))
    longest = max(int(n) for n in lengths)
    data = torch.frombuffer(bytearray(content.ljust(longest + 1)), dtype=torch.uint8)
    parts = [torch.empty_like(data) for _ in lengths]
    dist.all_gather(parts, data)
    return [part[: int(n)].numpy().tobytes() for part, n in zip(parts, lengths, strict=True)]
