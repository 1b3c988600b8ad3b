"""One run's side of a team (`fused.py`): what stands in the place of its blocks, and what it asks of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench import layout
from bench.fused_modules import Run, Span, Unfusable
from bench.turns import Member, Request
from bench.untouched import untouched
from methods.base import trains

if TYPE_CHECKING:
    from bench.clock import Phases

Rest = tuple[None, ...] | None


class Forward(Request):
    """What a run's first block was given. The answer is a Passed, or None: it is to use its own blocks."""

    def __init__(self, part: Part, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.part, self.given = part, hidden
        self.hidden = hidden.detach().requires_grad_(hidden.requires_grad)
        self.inputs, self.layout = (args, kwargs), layout.current()
        self.key = torch.is_grad_enabled()

    def run(self, index: int) -> Run:
        """For a pass in which this is run `index` of the stack."""
        return Run(index, self.hidden, *self.inputs, self.part.member.draws, self.layout)


class Passed:
    """What the blocks made of one run's tokens in a pass that others took part in."""

    def __init__(self, request: Forward, whole: Tensor, span: Span):
        self.request, self.whole, self.span = request, whole, span
        self.out = span.of(whole).detach().requires_grad_(whole.requires_grad)


class Backward(Request):
    """A run's gradient at the end of the blocks is there. The answer is None: what the blocks train has its own."""

    urgent = True

    def __init__(self, passed: Passed):
        self.passed = passed
        self.key = id(passed.whole)


class Part:
    """One run's side: it stands in the place of the model's blocks while the run trains."""

    def __init__(self, member: Member, model: nn.Module, blocks: list[nn.Module], phases: Phases, rest: Rest):
        self.member, self.model, self.blocks, self.phases, self.rest = member, model, blocks, phases, rest
        self.passed: Passed | None = None
        self.frozen = [p for b in blocks for p in b.parameters() if not trains(p)]
        self.versions = self._versions()

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Meet the others in the first block's place, inside this context."""
        self.inner = [b.forward for b in self.blocks]
        for block, own in zip(self.blocks, self.inner, strict=True):
            first = block is self.blocks[0]
            block.forward = partial(self._first if first else self._later, own)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)

    def backward(self) -> None:
        """After a run's own backward: the gradients of what its blocks train, and of what lies below them."""
        passed, self.passed = self.passed, None
        if passed is None or not passed.whole.requires_grad:
            return
        self.member.meet(Backward(passed))
        request = passed.request
        if request.given.requires_grad:
            torch.autograd.backward(request.given, request.hidden.grad)

    def own(self, run: Run) -> Tensor:
        """What the run's own blocks make of the first one's inputs."""
        hidden = run.hidden
        with run.draws.drawing(), layout.running(run.layout):
            for forward in self.inner:
                out = forward(hidden, *run.args, **run.kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def unchanged(self) -> None:
        """Raise RuntimeError where a method has changed frozen weights, which are the other runs' too."""
        if self._versions() != self.versions:
            raise RuntimeError("frozen weights were changed, which other runs share")

    def _versions(self) -> int:
        return sum(p._version for p in self.frozen)

    def _first(self, inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.passed = None
        if not (torch.is_inference_mode_enabled() or self.member.alone):  # predictions are each run's own
            self.passed = self.member.meet(Forward(self, hidden, args, kwargs))
        return inner(hidden, *args, **kwargs) if self.passed is None else self._typed(self.passed.out)

    def _later(self, inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(hidden, *args, **kwargs) if self.passed is None else self._typed(hidden)

    def _typed(self, hidden: Tensor) -> Any:
        return hidden if self.rest is None else (hidden, *self.rest)


def share(model: nn.Module, reference: dict[str, Tensor]) -> None:
    """Let the frozen tensors lie where the first run's lie that are the same."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = type(tensor) in (nn.Parameter, Tensor) and not trains(tensor)  # type: ignore[arg-type]
        first = reference.setdefault(name, tensor.detach()) if plain else None
        if first is not None and first.shape == tensor.shape and torch.equal(first, tensor.detach()):
            tensor.data = first


def chained(model: nn.Module, blocks: list[nn.Module], batch: dict[str, Tensor]) -> Rest:
    """What a block returns behind its hidden states: so many nulls, or null where they stand alone.

    Raises Unfusable unless each is called on what the one before returned, with the same further arguments: then all of
    them can be computed where the first is called.
    """
    calls: list[tuple[Any, list[Any], Any]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        calls.append((args[0] if args else None, [*args[1:], *kwargs.items()], result))

    with untouched(model), torch.no_grad():
        hooks = [b.register_forward_hook(note, with_kwargs=True) for b in blocks]
        model(**batch)
        for hook in hooks:
            hook.remove()
    if not blocks or len(calls) != len(blocks) or any("forward" in vars(b) for b in blocks):
        raise Unfusable("its blocks are not known, not each called once, or replaced by the method")
    given = calls[0][0]
    for hidden, rest, result in calls:
        first, *more = result if isinstance(result, tuple) else (result,)
        if hidden is not given or any(m is not None for m in more) or not _alike(rest, calls[0][1]):
            raise Unfusable(
                "its blocks are no plain chain: they hand on more than hidden states, or differ in their inputs"
            )
        given = first
    return tuple(more) if isinstance(result, tuple) else None


def _alike(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, tuple) and isinstance(y, tuple):
            return len(x) == len(y) and all(map(same, x, y))
        return x is y or (not isinstance(x, Tensor) and type(x) is type(y) and x == y)

    return len(a) == len(b) and all(map(same, a, b))
