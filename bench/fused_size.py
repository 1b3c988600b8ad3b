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
from bench.untouched import perturbed

if TYPE_CHECKING:
    from bench.fused import Forward

log = logging.getLogger("bench")
REPEATS = 3
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest hidden state; half precision: 2e-2


def measured(stack: Stack, requests: Sequence[Forward], *, timed: bool) -> int:
    """How many of these runs to compute at once: the number at which one costs the least.

    Nothing is left behind: no gradient, no draw. Raises Unfusable where alone costs less, or the results are not the same.
    """
    runs = [request.run(i) for i, request in enumerate(requests)]
    before = [(r.draws.torch.get_state(), r.draws.cuda) for r in runs]

    def anew(count: int) -> list[Run]:
        for run, (state, cuda) in zip(runs[:count], before, strict=False):
            run.draws.torch.set_state(state)
            run.draws.cuda = cuda
        return runs[:count]

    def at_once(count: int) -> list[Tensor]:
        whole, spans = stack(anew(count))
        whole = _gradients(whole)
        return [span.of(whole) for span in spans]

    def alone(count: int) -> list[Tensor]:
        return [_gradients(requests[run.index].part.own(run)) for run in anew(count)]

    try:
        with ExitStack() as others:  # a change that starts as none would not show what becomes of it
            for request in requests:
                others.enter_context(perturbed(nn.ModuleList(request.part.blocks)))
            _check(at_once(len(runs)), alone(len(runs)))
        return _best(alone, at_once, len(runs), runs[0].hidden.device) if timed else len(runs)
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
            f"one alone costs less on this device (seconds of its blocks per run at once, over alone: {shares})"
        )
    log.info("%d runs at once (seconds of its blocks per run at once, over alone: %s)", best, shares)
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


def _gradients(whole: Tensor) -> Tensor:
    """Compute those of everything trained, and leave none; the hidden states themselves."""
    if whole.requires_grad:
        leaves = _leaves(whole)
        torch.autograd.grad(whole, leaves, torch.ones_like(whole), allow_unused=True)
    return whole.detach()


def _leaves(whole: Tensor) -> list[Tensor]:
    """What a graph would give gradients to."""
    found, seen, todo = [], set(), [whole.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(n for n, _ in node.next_functions)
    return found


def _check(ours: list[Tensor], own: list[Tensor]) -> None:
    for a, b in zip(ours, own, strict=True):
        worst = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
        if not worst <= TOLERANCE.get(b.dtype, 2e-2):
            raise Unfusable(
                f"computed at once, its blocks give another result (by {worst:.1g} of the largest hidden state)"
            )
