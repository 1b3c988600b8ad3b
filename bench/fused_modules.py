"""Modules that compute each run's rows by that run's own module, in a pass over those of all runs (`fused_stack.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.layout import Layout, current, running
from bench.turns import Draws
from methods.base import Batch


class Unfusable(Exception):
    """These runs cannot be computed at once; a sentence says why."""


@dataclass
class Run:
    """One run's part in a pass: its batch, and what of the process is its own."""

    index: int  # among the runs of the stack
    batch: Batch
    draws: Draws
    layout: Layout | None  # of its tokens, where they are packed

    @property
    def rows(self) -> int:
        return len(self.batch["labels"])

    @property
    def width(self) -> int | None:
        """Positions of its rows of text."""
        ids = self.batch.get("input_ids")
        return None if ids is None else ids.shape[1]

    @cached_property
    def padded(self) -> bool:
        """Whether its rows of text have padding."""
        mask: Any = self.batch.get("attention_mask")
        return mask is not None and not bool(getattr(mask, "host", mask).all())

    @property
    def tokens(self) -> int:
        """Those that blocks compute where all runs are packed."""
        return self.layout.tokens if self.layout else self.rows * int(self.width or 0)

    @contextmanager
    def own(self) -> Iterator[None]:
        """The run's draws and its layout of packed tokens, inside the block."""
        with self.draws.drawing(), running(self.layout):
            yield


class Pass:
    """Whose rows are whose in the pass that is being computed: all runs' lie one behind the other."""

    def __init__(self) -> None:
        self.attention: Callable[..., Any] | None = None
        self.skips = False  # whether transformers gives it no mask where nothing is padded
        self.begin([])

    def begin(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.rows = [run.rows for run in runs]
        self.width = max((run.width or 0 for run in runs), default=0)

    def each(self, compute: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """`compute` of each run and its parts of `xs`; the results, one behind the other again, are laid out as the first of `xs`."""
        parts = zip(*map(self.parts, xs), strict=True)
        return self.whole([compute(run, *own) for run, own in zip(self.runs, parts, strict=True)], xs[0])

    def parts(self, x: Tensor) -> list[Tensor]:
        """What each run would have in the place of x, alone: packed tokens (1, tokens, ...), or rows no wider than its own."""
        if self._packed(x):
            own = x[0].split([run.tokens for run in self.runs])
            return [
                t[None] if run.layout else t.unflatten(0, (run.rows, -1)) for run, t in zip(self.runs, own, strict=True)
            ]
        if x.dim() == 0 or x.shape[0] != sum(self.rows):
            raise Unfusable(f"a module that differs is given {tuple(x.shape)} for {sum(self.rows)} rows")
        own = x.split(self.rows)
        return [t[:, : run.width] for run, t in zip(self.runs, own, strict=True)] if self._wide(x) else [*own]

    def whole(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The other way round."""
        if self._packed(like):
            return torch.cat([t.flatten(0, 1) for t in parts])[None]
        if self._wide(like):
            parts = [t if t.shape[1] == self.width else _widened(t, self.width) for t in parts]
        return torch.cat([*parts])

    def _packed(self, x: Tensor) -> bool:
        layout = current()
        return layout is not None and layout.holds(x)

    def _wide(self, x: Tensor) -> bool:
        """Whether x has the positions of text: (rows, positions) of ids, (rows, positions, ...) of states."""
        return x.dim() > (1 if not x.is_floating_point() else 2) and 0 < self.width == x.shape[1]


def _widened(x: Tensor, width: int) -> Tensor:
    return torch.cat([x, x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])], 1)


PASS = Pass()  # one at a time


def same_place(tensors: Sequence[Any]) -> bool:
    """Whether tensors are one in memory; or all None."""
    return len({None if t is None else t.data_ptr() for t in tensors}) == 1


class Each(nn.Module):
    """In the place of a module: that of each run, on that run's rows."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members: tuple[Any, ...] = tuple(members)  # no submodules of this one

    def __getattr__(self, name: str) -> Any:
        """What is asked of the module in its place: a dropout's rate, a layer's size."""
        return getattr(vars(self)["members"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        more = [a for a in args if isinstance(a, Tensor)]
        if len(more) < len(args):
            raise Unfusable(f"{type(self.members[0]).__name__} is given more than tensors")

        def compute(run: Run, *own: Tensor) -> Tensor:
            with run.own():
                return self.members[run.index](*own, **kwargs)

        return PASS.each(compute, x, *more)


class EachBias(Each):
    """Linear layers of one frozen weight, by which all rows are multiplied at once, and of biases of their own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return PASS.each(lambda run, y: y + self.members[run.index].bias, F.linear(x, self.members[0].weight))


class EachChange(Each):
    """Changes to one frozen linear layer, `Adapted.base`: what it makes of all rows is computed at once.

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

        def compute(run: Run, own: Tensor, product: Tensor) -> Tensor:
            module = self.members[run.index]
            with run.own(), self._giving(module.base, own, product):
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
        noise = torch.zeros_like(x)
        for run, part in zip(PASS.runs, PASS.parts(noise), strict=True):
            part.bernoulli_(1 - p, generator=run.draws.torch)
        return x * noise.div_(1 - p)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Every run's rows attend to their own, by the implementation that the runs have, under the mask that they have alone."""
    inner = PASS.attention
    assert inner is not None
    masks = _masks(mask, skipped=PASS.skips and not kwargs.get("sliding_window"))

    def compute(run: Run, *own: Tensor) -> Tensor:
        with run.own():
            found: Tensor = inner(module, *(t.transpose(1, 2) for t in own), masks.get(run.index), **kwargs)[0]
        return found

    return PASS.each(compute, *(t.transpose(1, 2) for t in (query, key, value))), None


def _masks(mask: Tensor | None, *, skipped: bool) -> dict[int, Tensor]:
    """Each run's part of a mask (rows or 1, 1, positions, positions); none, where `skipped`, for a run without padding."""
    if mask is None:
        return {}
    rows = mask.expand(sum(PASS.rows), *mask.shape[1:]).split(PASS.rows)
    own = zip(PASS.runs, rows, strict=True)
    return {run.index: part[..., : run.width, : run.width] for run, part in own if run.padded or not skipped}
