"""One run's side of a team (`fused.py`): what stands in the place of its model, and what it asks of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench import layout
from bench.fused_modules import Run
from bench.turns import Member, Request
from methods.base import Adapted, Added, Batch, trains

if TYPE_CHECKING:
    from bench.clock import Phases


class Forward(Request):
    """A run's batch. The answer is a Passed, or None: it is to use its own model."""

    def __init__(self, part: Part, batch: Batch):
        self.part, self.batch = part, batch
        self.key = torch.is_grad_enabled()

    def run(self, index: int) -> Run:
        """For a pass in which this is run `index` of the stack."""
        mask: Any = self.batch.get("attention_mask")
        packed = layout.Layout.of(mask, getattr(mask, "host", None)) if self.part.packed else None
        return Run(index, self.batch, self.part.member.draws, packed)


class Passed:
    """A run's loss in a pass that others took part in: `whole` in its graph, `loss` as the run sees it."""

    def __init__(self, whole: Tensor):
        self.whole = whole
        self.loss = whole.detach().requires_grad_(whole.requires_grad)


class Backward(Request):
    """The gradient of a run's loss is there. The answer is None: what the run trains has its own."""

    urgent = True

    def __init__(self, passed: Passed):
        self.passed = passed
        self.key = "backward"


class Part:
    """One run's side: it stands in the place of the model while the run trains."""

    def __init__(self, member: Member, model: nn.Module, phases: Phases, *, packed: bool):
        self.member, self.model, self.phases, self.packed = member, model, phases, packed
        self.passed: Passed | None = None
        self.frozen = [p for p in model.parameters() if not trains(p)]
        self.versions = self._versions()

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Meet the others in the model's place, inside this context."""
        self.inner: Callable[..., Any] = self.model.forward
        self.model.forward = self._forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.model.forward

    def backward(self) -> None:
        """After a run's own backward, which ends at its loss: the gradients of what it trains."""
        passed, self.passed = self.passed, None
        if passed is not None and passed.whole.requires_grad:
            self.member.meet(Backward(passed))

    def own(self, run: Run) -> Tensor:
        """The loss by the run's own model."""
        with run.draws.drawing():
            loss: Tensor = self.inner(**run.batch).loss
        return loss

    def unchanged(self) -> None:
        """Raise RuntimeError where a method has changed frozen weights, which are the other runs' too."""
        if self._versions() != self.versions:
            raise RuntimeError("frozen weights were changed, which other runs share")

    def _versions(self) -> int:
        return sum(t._version for t in self.frozen)

    def _forward(self, **batch: Tensor) -> Any:
        self.passed = None
        if not (torch.is_inference_mode_enabled() or self.member.alone):  # predictions are each run's own
            self.passed = self.member.meet(Forward(self, batch))
        return self.inner(**batch) if self.passed is None else SimpleNamespace(loss=self.passed.loss)


def share(model: nn.Module, reference: dict[str, Tensor]) -> None:
    """Let the frozen tensors lie where the first run's lie that are the same, but for those of a method's own layers.

    A buffer there may count something.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = isinstance(model.get_submodule(name.rpartition(".")[0]), Adapted | Added)
        if own or type(tensor) not in (nn.Parameter, Tensor) or trains(tensor):  # type: ignore[arg-type]
            continue
        first = reference.setdefault(name, tensor.detach())
        if first.shape == tensor.shape and torch.equal(first, tensor.detach()):
            tensor.data = first
