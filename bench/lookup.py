"""Stored hidden states in the place of the blocks that would compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from bench.layout import as_rows, current
from bench.prefix import Prefix
from methods.base import Batch

NAME = "features"  # of what a batch carries beside the model's inputs


class Lookup:
    """Puts the features that a call of the model is given in the place of what its prefix would compute.

    They are the states `kept` of the prefix (`Prefix.read`), one behind the other in the first dimension (`Plan.read`). A
    block whose output is not among them returns what it is given.
    """

    def __init__(self, model: nn.Module, prefix: Prefix):
        self.model, self.prefix = model, prefix
        self.kept = prefix.read
        self.given: dict[int, Tensor] | None = None  # states of the running call
        self.packed = False  # whether they have no padding
        self.found: dict[int, Tensor] | None = None  # while they are computed
        self.read = False
        self.below = [m for outer in prefix.below.values() for m in outer.modules()]
        self.marks = self._marks()
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)
        prefix.chain[0].register_forward_pre_hook(self._enter, prepend=True)
        for k, module in enumerate(prefix.chain, 1):
            module.forward = partial(self._forward, k, module.forward)  # type: ignore[method-assign]

    def compute(self, batch: Batch) -> list[Tensor]:
        """What the prefix makes of the batch, `kept` state by state; the rest of the network does not run."""
        self.found = {}
        try:
            self.model(**{k: v for k, v in batch.items() if k != NAME})
        except _Reached:
            return [self.found[k] for k in self.kept]
        finally:
            self.found = None
        raise RuntimeError(f"{self.prefix.names[-1]} was not called: the model has changed since its prefix was found")

    def _marks(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for m in self.below for p in m._parameters.values() if p is not None]

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features, self.read = kwargs.pop(NAME, None), False
        self.given = None
        if features is None:
            return args, kwargs
        if self._marks() != self.marks:
            raise RuntimeError("frozen weights were changed: their features no longer hold; use train.features=off")
        self.packed = features.dim() == 3
        states = features.unbind() if features.dim() > 2 else (features,)
        self.given = dict(zip(self.kept, states, strict=True))
        return args, kwargs

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.given is not None and not self.read:
            raise RuntimeError(f"{self.prefix.names[-1]} was not called: use train.features=off")
        self.given = None

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the first block, before all others: state 0."""
        if self.found is not None:
            self.found[0] = args[0]
        return (self.given[0], *args[1:]) if self.given and 0 in self.given else args

    def _forward(self, k: int, inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        last = k == len(self.prefix.chain)
        if self.given is None:
            result = inner(hidden, *args, **kwargs)
            if self.found is not None:
                if k in self.kept:
                    self.found[k] = as_rows(result[0] if isinstance(result, tuple) else result)
                if last:
                    raise _Reached
            return result
        self.read |= last
        value = self._like(hidden, self.given[k]) if k in self.given else hidden
        rest = self.prefix.rest[k - 1]
        return value if rest is None else (value, *rest)

    def _like(self, hidden: Tensor, state: Tensor) -> Tensor:
        """A given state as `hidden` is, packed or padded."""
        layout = current()
        if layout is None:  # packed: no row is shorter than another
            return state.view(*hidden.shape[:2], -1) if self.packed else state
        inside = layout.holds(hidden)
        if self.packed:
            return state[None] if inside else layout.unpack(state[None])
        return layout.pack(state) if inside and state.shape[:2] == (len(layout.lengths), layout.width) else state


class _Reached(Exception):
    """The prefix has ended."""
