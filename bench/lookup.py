"""Stored hidden states in the place of the prefix that would compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from bench.layout import as_given, as_rows
from bench.prefix import Prefix
from methods.base import Batch

NAME = "features"  # of what a batch carries beside the model's inputs


class Lookup:
    """Puts the features that a call of the model is given in the place of what its prefix would compute."""

    def __init__(self, model: nn.Module, prefix: Prefix):
        self.model, self.prefix = model, prefix
        self.given: Tensor | None = None
        self.read = self.stops = False
        self.marks = self._marks()
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)
        for k, module in enumerate(prefix.chain):
            module.forward = partial(self._forward, k, module.forward)  # type: ignore[method-assign]

    def compute(self, batch: Batch) -> Tensor:
        """What the prefix makes of the batch; the rest of the network does not run."""
        self.stops = True
        try:
            self.model(**{k: v for k, v in batch.items() if k != NAME})
        except _Reached as end:
            return end.hidden
        finally:
            self.stops = False
        raise RuntimeError(f"{self.prefix.names[-1]} was not called: the model has changed since its prefix was found")

    def _marks(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for m in self.prefix.below.values() for p in m.parameters()]

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.given, self.read = kwargs.pop(NAME, None), False
        if self.given is not None and self._marks() != self.marks:
            raise RuntimeError("frozen weights were changed: their features no longer hold; use train.features=off")
        return args, kwargs

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.given is not None and not self.read:
            raise RuntimeError(f"{self.prefix.names[-1]} was not called: use train.features=off")
        self.given = None

    def _forward(self, k: int, inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        last = k == len(self.prefix.chain) - 1
        if self.given is None:
            result = inner(hidden, *args, **kwargs)
            if last and self.stops:
                raise _Reached(as_rows(result[0] if isinstance(result, tuple) else result))
            return result
        self.read |= last
        value, rest = as_given(hidden, self.given) if last else hidden, self.prefix.rest[k]
        return value if rest is None else (value, *rest)


class _Reached(Exception):
    def __init__(self, hidden: Tensor):
        self.hidden = hidden
