"""A key-value cache with room behind its last token: one more token is written there, and nothing is copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens of room that a copy makes: one copy for so many steps


class RoomyLayer(DynamicLayer):
    """As `DynamicLayer`, which copies all that it holds for each new token.

    `keys` and `values`, (rows, heads, tokens, size), are views of tensors with room. Whoever selects rows or cuts tokens
    puts other tensors there; these get their own room with the next token.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = _appended(self.keys, key_states)
        self.values = _appended(self.values, value_states)
        return self.keys, self.values


def with_room(cache: Any) -> Any:
    """`cache` with room in its plain layers that hold something; sliding windows and other kinds stay as they are."""
    cache.layers = [RoomyLayer(c) if type(c) is DynamicLayer and c.is_initialized else c for c in cache.layers]
    return cache


def _appended(held: Any, new: Tensor) -> Tensor:
    """`held` and `new` along the tokens: a view of the tensor `room` that the view before it came from, if that is wide enough."""
    start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
    room = getattr(held, "room", None)
    if room is None or room.shape[-2] < end:
        room = held.new_empty(*held.shape[:-2], end + ROOM, held.shape[-1])
        room[..., :start, :] = held
    room[..., start:end, :] = new
    view: Any = room[..., :end, :]
    view.room = room
    return view
