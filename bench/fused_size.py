"""How many runs to compute at once: measured on their own first batches, with the proof that it changes nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.clock import synchronize
from bench.fused_modules import Run, Unfusable
from bench.fused_stack import Stack
from bench.untouched import perturbed, untouched

if TYPE_CHECKING:
    from bench.fused import Forward

log = logging.getLogger("bench")
REPEATS = 3
Found = tuple[Tensor, list[Tensor | None]]  # a run's loss and its gradients
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the loss, and of a run's largest gradient; in half 2e-2


def measured(stack: Stack, requests: Sequence[Forward], *, timed: bool) -> int:
    """How many of these runs to compute at once: the number at which one costs the least.

    Nothing is left behind: no gradient, no draw, no buffer. Raises Unfusable where alone costs less, or the results are not the same.
    """
    runs = [request.run(i) for i, request in enumerate(requests)]
    before = [(r.draws.torch.get_state(), r.draws.cuda) for r in runs]

    def anew(count: int) -> list[Run]:
        for run, (state, cuda) in zip(runs[:count], before, strict=False):
            run.draws.torch.set_state(state)
            run.draws.cuda = cuda
        return runs[:count]

    trained = [[p for p in request.part.model.parameters() if p.requires_grad] for request in requests]

    def at_once(count: int) -> list[Found]:
        losses = stack(anew(count))
        each = iter(_gradients(losses, [p for own in trained[:count] for p in own]))
        return [(loss.detach(), [next(each) for _ in own]) for loss, own in zip(losses, trained, strict=False)]

    def alone(count: int) -> list[Found]:
        losses = [requests[run.index].part.own(run) for run in anew(count)]
        return [(x.detach(), _gradients([x], own)) for x, own in zip(losses, trained, strict=False)]

    try:
        with ExitStack() as around:
            for request in requests:  # a method may count what passes, as importance
                around.enter_context(untouched(request.part.model))
            with ExitStack() as others:  # a change that starts as none would not show what becomes of it
                for request in requests:
                    others.enter_context(perturbed(request.part.model))
                _check(at_once(len(runs)), alone(len(runs)))
            return _best(alone, at_once, len(runs), runs[0].batch["labels"].device) if timed else len(runs)
    finally:
        anew(len(runs))


def _best(alone: Callable[[int], Any], at_once: Callable[[int], Any], runs: int, device: torch.device) -> int:
    """The number with the fewest seconds per run, halving it until that gets worse."""
    one = _seconds(lambda: alone(min(runs, 2)), device) / min(runs, 2)
    found = {}
    size = runs
    while size > 1:
        found[size] = _seconds(lambda: at_once(size), device) / size  # noqa: B023
        if min(found.values()) < found[size] or found[size] < 0.7 * one:
            break
        size //= 2
    best = min(found, key=found.__getitem__)
    shares = ", ".join(f"{n}: {seconds / one:.2f}" for n, seconds in found.items())
    if found[best] > one:
        raise Unfusable(
            f"one alone costs less on this device (seconds of a loss and its gradients per run at once, over alone: {shares})"
        )
    log.info("%d runs at once (seconds of a loss and its gradients per run at once, over alone: %s)", best, shares)
    return best


def _seconds(act: Callable[[], Any], device: torch.device) -> float:
    spent = []
    for _ in range(REPEATS):
        synchronize(device)
        since = time.perf_counter()
        act()
        synchronize(device)
        spent.append(time.perf_counter() - since)
    return min(spent)


def _gradients(losses: list[Tensor], trained: list[nn.Parameter]) -> list[Tensor | None]:
    """Those of each trained parameter; none is left behind. All None where the losses are in no graph."""
    if not trained or not losses[0].requires_grad:
        return [None] * len(trained)
    return [*torch.autograd.grad(losses, trained, [torch.ones_like(x) for x in losses], allow_unused=True)]


def _check(ours: list[Found], own: list[Found]) -> None:
    for (loss, gradients), (expected, theirs) in zip(ours, own, strict=True):
        pairs = [(a, b) for a, b in zip(gradients, theirs, strict=True) if a is not None and b is not None]
        largest = max((float(b.abs().max()) for _, b in pairs), default=0.0)
        worst = max((float((a - b).abs().max()) for a, b in pairs), default=0.0) / max(largest, 1e-30)
        worst = max(worst, float((loss - expected).abs() / expected.abs().clamp(min=1e-30)))
        if not worst <= TOLERANCE.get(expected.dtype, 2e-2) or [a is None for a in gradients] != [
            b is None for b in theirs
        ]:
            raise Unfusable(
                f"computed at once, it gives another result (loss or gradients, by {worst:.1g} of the largest)"
            )
