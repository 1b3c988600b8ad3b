"""Which token of a packed batch belongs to which row, and the way between packed tokens and padded rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

_current: list[Layout | None] = [None]  # of the forwards that this process is in, the innermost last


def current() -> Layout | None:
    """The layout of the packed forward (or recomputation of a block) that is running; None outside, and where it is padded."""
    return _current[-1]


@contextmanager
def running(layout: Layout | None) -> Iterator[None]:
    """`layout` is the current one inside the block."""
    _current.append(layout)
    try:
        yield
    finally:
        _current.pop()


def forwards() -> list[Layout | None]:
    """The layouts of all forwards that this process is in, for `resume`."""
    return [*_current]


def resume(layouts: list[Layout | None]) -> None:
    """Be in these forwards again: where threads take turns, each has its own."""
    _current[:] = layouts


def recomputing() -> tuple[Any, Any]:
    """`context_fn` of torch's checkpoint: what is computed again in the backward has the layout of its forward."""
    return nullcontext(), running(current())


@dataclass(eq=False)
class Layout:
    """The T real tokens of a batch of rows, in the order of its rows and, within a row, of its positions.

    Row i has tokens `offsets[i]` to `offsets[i + 1]`; token t stands in row `places[t] // width`, at position
    `places[t] % width`.
    """

    lengths: list[int]  # real tokens of each row
    width: int  # positions of a padded row
    places: Tensor  # (T,) int64, ascending: each token's index into the padded rows, one behind the other
    at_once: bool = False  # whether all rows attend at once, padded, as on a GPU
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of `like`: packed, and what it was made from

    @classmethod
    def of(cls, mask: Tensor, host: Tensor | None = None) -> Layout | None:
        """The layout of an attention mask (rows, width); None where nothing is padded.

        `host` is the same mask in the host's memory: with it, no device is waited for.
        """
        real = (mask if host is None else host).bool()
        lengths, width = real.sum(1).tolist(), real.shape[1]
        if min(lengths) == width:
            return None
        places = real.flatten().nonzero().squeeze(1)
        return cls(lengths, width, places.to(mask.device, non_blocking=True))

    @cached_property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> list[int]:
        """Where each row begins among the tokens, and T."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Neighbouring rows of one length: (rows, tokens of each)."""
        return [(len(list(group)), length) for length, group in groupby(self.lengths) if length]

    def holds(self, x: Tensor) -> bool:
        """Whether `x` is packed: (1, T, ...)."""
        return x.dim() > 1 and x.shape[:2] == (1, self.tokens)

    def pack(self, x: Tensor) -> Tensor:
        """(rows, width, ...) to (1, T, ...)."""
        packed: Tensor = _Pack.apply(x.flatten(0, 1), self.places)  # type: ignore[no-untyped-call]
        return packed[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) to (rows, width, ...), zeros on padding."""
        size = len(self.lengths) * self.width
        flat: Tensor = _Unpack.apply(x[0], self.places, size)  # type: ignore[no-untyped-call]
        return flat.unflatten(0, (len(self.lengths), self.width))

    def like(self, x: Any) -> Any:
        """Anything about positions, (1 or rows, width, ...), as (1, T, ...): made once for all blocks. Tuples inside; None stays."""
        if isinstance(x, tuple):
            return tuple(map(self.like, x))
        if x is None:
            return None
        if id(x) not in self.kept:
            self.kept[id(x)] = self.pack(x.expand(len(self.lengths), *x.shape[1:])), x
        return self.kept[id(x)][0]


def as_rows(x: Tensor) -> Tensor:
    """`x`, unpacked where it is packed now."""
    layout = current()
    return layout.unpack(x) if layout is not None and layout.holds(x) else x


class _Pack(torch.autograd.Function):
    """x[places], whose backward is a copy and no sum, since no place comes twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, places, grad), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None
