"""Modules that compute each run's tokens by that run's own module, in a pass over those of all runs (`fused_stack.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.layout import Layout, running
from bench.turns import Draws


class Unfusable(Exception):
    """These runs cannot be computed at once; a sentence says why."""


@dataclass
class Run:
    """One run's part in a pass: what its first block was given, and what of the process is its own."""

    index: int  # among the runs of the stack
    hidden: Tensor  # (rows, positions, width); of packed batches (1, tokens, width)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    draws: Draws
    layout: Layout | None  # of its packed tokens


@dataclass
class Span:
    """The tokens of one run: `start` to `end` of N, which are `shape` = (rows, positions)."""

    start: int
    end: int
    shape: tuple[int, int]
    mask: Any
    run: Run

    @contextmanager
    def own(self) -> Iterator[None]:
        """The run's draws and its layout of packed tokens, inside the block."""
        with self.run.draws.drawing(), running(self.run.layout):
            yield

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    def of(self, x: Tensor) -> Tensor:
        """This run's part of (1, N, ...), as (rows, positions, ...)."""
        return x[0, self.start : self.end].unflatten(0, self.shape)


class Pass:
    """Which tokens are whose in the pass that is being computed."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.attention: Callable[..., Any] | None = None

    def each(self, compute: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """`compute` of each run's parts of the (1, N, ...) tensors, one behind the other again."""
        parts = zip(*map(self.parts, xs), strict=True)
        return torch.cat([compute(s, *own).flatten(0, 1) for s, own in zip(self.spans, parts, strict=True)])[None]

    def parts(self, x: Tensor) -> list[Tensor]:
        """(1, N, ...) as (rows, positions, ...) of each run."""
        whole = x[0].split([s.tokens for s in self.spans])
        return [part.unflatten(0, s.shape) for part, s in zip(whole, self.spans, strict=True)]


PASS = Pass()  # one at a time


def same_place(tensors: Sequence[Any]) -> bool:
    """Whether tensors are one in memory; or all None."""
    return len({None if t is None else t.data_ptr() for t in tensors}) == 1


class Each(nn.Module):
    """In the place of a module: that of each run, on that run's tokens."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members: tuple[Any, ...] = tuple(members)  # no submodules of this one

    def __getattr__(self, name: str) -> Any:
        """What a block asks of the module in its place: a dropout's rate, a layer's size."""
        return getattr(vars(self)["members"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        more = [a for a in args if isinstance(a, Tensor)]
        if len(more) < len(args):
            raise Unfusable(f"{type(self.members[0]).__name__} is given more than tensors")

        def compute(span: Span, *own: Tensor) -> Tensor:
            with span.own():
                return self.members[span.run.index](*own, **kwargs)

        return PASS.each(compute, x, *more)


class EachBias(Each):
    """Linear layers of one frozen weight, by which all tokens are multiplied at once, and of biases of their own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return PASS.each(lambda span, y: y + self.members[span.run.index].bias, F.linear(x, self.members[0].weight))


class EachChange(Each):
    """Changes to one frozen linear layer, `Adapted.base`: what it makes of all tokens is computed at once.

    A change that gives its base anything but its own input computes that itself.
    """

    def __init__(self, members: Sequence[Any]):
        super().__init__(members)
        self.one_bias = same_place([m.base.bias for m in members])
        self.read = True  # whether a change calls its base on its own input: seen in each pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.read:
            return super().forward(x, *args, **kwargs)
        base, self.read = self.members[0].base, False
        whole = F.linear(x, base.weight, base.bias if self.one_bias else None)

        def compute(span: Span, own: Tensor, product: Tensor) -> Tensor:
            module = self.members[span.run.index]
            with span.own(), self._giving(module.base, own, product):
                return module(own)

        return PASS.each(compute, x, whole)

    @contextmanager
    def _giving(self, base: nn.Linear, given: Tensor, product: Tensor) -> Iterator[None]:
        def forward(x: Tensor) -> Tensor:
            if x is not given:
                return nn.Linear.forward(base, x)
            self.read = True
            return product if self.one_bias else product + base.bias

        vars(base)["forward"] = forward
        try:
            yield
        finally:
            del vars(base)["forward"]


class EachDropout(Each):
    """Dropout with each run's own mask. On a CPU one product for all, of exactly the numbers that `nn.Dropout` draws."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cpu":  # a kernel that draws in an order of its own
            return super().forward(x)
        p = self.members[0].p  # as of all: `fused_stack.py`
        noise = torch.empty_like(x)
        for s in PASS.spans:
            noise[:, s.start : s.end].bernoulli_(1 - p, generator=s.run.draws.torch)
        return x * noise.div_(1 - p)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Every run's rows attend to their own, by the implementation that the runs have. Of (1, heads, N, width each)."""
    inner = PASS.attention
    assert inner is not None

    def compute(span: Span, *own: Tensor) -> Tensor:
        with span.own():
            return inner(module, *(t.transpose(1, 2) for t in own), span.mask, **kwargs)[0]

    return PASS.each(compute, *(t.transpose(1, 2) for t in (query, key, value))), None
