"""K runs over one frozen backbone at once: `hydra/launcher=fused`.

Each run is the code of `run.py` in a thread of its own (`turns.py`). In training its model is not called: it hands its batch to
the others' (`fused_stack.py`), gets its own loss back, and hands back that loss's gradient. Data, penalties, optimizers,
schedules, evaluation and records are the run's own, untouched.

The rule by which costs are shared: a run's clock stands still while others are at work, and of what is computed together each
run pays an equal share; bytes are counted by kind on its own model, as if it were alone. Its record says how many they were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import distributed, layout
from bench.fused_modules import Unfusable
from bench.fused_part import Backward, Forward, Part, Passed, share
from bench.fused_stack import Stack
from bench.turns import Kept, Member, Turns, member

if TYPE_CHECKING:
    from bench.clock import Phases
    from bench.config import Config
    from bench.prepare import Prepared

log = logging.getLogger("bench")


class Team(Turns):
    """Runs that are trained together: as many at once as costs the least, or, where not `timed`, all of them."""

    def __init__(self, keeps: Sequence[Kept] = (), *, timed: bool = True):
        super().__init__(self._respond, [(layout.forwards, layout.resume), *keeps])
        self.timed = timed
        self.stack: Stack | None = None
        self.parts: list[Part] = []
        self.reference: dict[str, Tensor] = {}

    def _respond(self, group: list[Member]) -> None:
        requests: Any = [m.request for m in group]
        if isinstance(requests[0], Backward):
            self._backward(group, [r.passed for r in requests])
            return
        if self.stack is None and len(group) > 1:
            group = self._begin(group, requests)
        if len(group) > 1:
            self._forward(group, requests[: len(group)])
        else:  # of one whose others have ended
            for m in group:
                m.answer(None)

    def _begin(self, group: list[Member], requests: list[Forward]) -> list[Member]:
        """Decide at the first step how many go on together; the others wait, or all go on alone."""
        from bench.fused_size import measured

        try:
            self.stack = self._stack([r.part for r in requests])
            size = measured(self.stack, requests, timed=self.timed)
        except Exception as why:  # no step is done yet: each can go on as it is
            say_alone(why)
            for m in group:
                m.alone = True
                m.answer(None)
            return []
        self.hold(group[size:], size)
        return group[:size]

    def _stack(self, parts: list[Part]) -> Stack:
        """Made of the models as they are: what stands in their places is put aside."""
        self.parts = parts
        standing = [vars(part.model).pop("forward") for part in parts]
        try:
            return Stack([part.model for part in parts])
        finally:
            for part, forward in zip(parts, standing, strict=True):
                part.model.forward = forward

    def _forward(self, group: list[Member], requests: list[Forward]) -> None:
        assert self.stack is not None
        for request in requests:
            request.part.unchanged()
        losses = self.stack([r.run(self.parts.index(r.part)) for r in requests])
        for m, request, loss in zip(group, requests, losses, strict=True):
            request.part.phases.fused = max(request.part.phases.fused, len(group))
            m.answer(Passed(loss))

    def _backward(self, group: list[Member], passed: list[Passed]) -> None:
        torch.autograd.backward([p.whole for p in passed], [p.loss.grad for p in passed])
        for m in group:
            m.answer(None)


def say_alone(why: Exception) -> None:
    """Log why runs are not fused."""
    log.info("not fused, in turn: %s", why if isinstance(why, Unfusable) else f"{type(why).__name__}: {why}")


def backward() -> None:
    """What the training loop calls after each `loss.backward()`: nothing, unless the run is one of a team."""
    here = member()
    if here is not None and (part := getattr(here, "part", None)) is not None:
        part.backward()


@contextmanager
def joined(ready: Prepared, config: Config, phases: Phases) -> Iterator[None]:
    """Train in the team of this thread, where there is one and the model can be computed with the others'."""
    here = member()
    if here is None or here.alone:
        yield
        return
    try:
        part = _part(here, ready, config, phases)
    except Unfusable as why:
        say_alone(why)
        here.alone = True
        yield
        return
    here.part = part  # type: ignore[attr-defined]
    with part.standing():
        yield


def _part(here: Member, ready: Prepared, config: Config, phases: Phases) -> Part:
    train = config.train
    if train.gradient_checkpointing or train.features != "off" or train.offload != "none":
        raise Unfusable("it needs train.gradient_checkpointing=false, train.features=off and train.offload=none")
    if distributed.launched() > 1:
        raise Unfusable("torchrun computes one run on all devices")
    assert isinstance(here.turns, Team)
    share(ready.model, here.turns.reference)
    return Part(here, ready.model, phases, packed=ready.packed)
