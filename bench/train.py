"""The training loop: the only one. Every method goes through it."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench import distributed, fused, offload
from bench.ledger import Claim, Claimed
from bench.model import load_trained_state, trained_state
from bench.parts import clip, parted, unscaled
from bench.prefix import train_mode
from bench.sharding import in_step
from bench.turns import member

if TYPE_CHECKING:
    from bench.batches import TrainBatches
    from bench.config import TrainConfig
    from bench.measure import StepTimer
    from methods.base import Batch, Method


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # the last: submitit's, before a job reaches its time limit


class Diverged(Exception):
    """The training loss is no longer a finite number."""


class Interrupted(Exception):
    """The process was asked to stop; what was computed is in the checkpoint."""


@dataclass
class Progress:
    """All that a run needs beside model and optimizer to go on where it stopped."""

    step: int = 0  # optimizer steps done
    evaluated: int = 0  # the last step at which `val` was scored
    history: list[dict[str, float | None]] = field(default_factory=list)
    best_step: int | None = None
    best_score: float | None = None
    best_state: dict[str, Tensor] | None = None
    best_method: dict[str, Any] = field(default_factory=dict)  # the method's own state then
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0  # evaluations since the best one
    loss_scale: float = 2.0**16  # fp16 only


class Loop:
    """One training: model, method, optimizer and schedule, stepped until `steps`."""

    def __init__(self, model: nn.Module, method: Method, cfg: TrainConfig, *, steps: int, device: torch.device):
        offload.check(cfg.offload, device)
        self.model, self.method, self.cfg, self.steps, self.device = model, method, cfg, steps, device
        lr = method.lr if cfg.lr is None else cfg.lr
        self.optimizer = method.optimizer(model, lr, cfg.weight_decay)
        factor = partial(schedule, kind=cfg.schedule, warmup=math.ceil(cfg.warmup * steps), steps=steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.progress = Progress()

    def step(self, parts: list[Batch]) -> float:
        """One optimizer step on the micro-batches `parts`; returns the loss."""
        counts = [int((part["labels"] != -100).sum()) for part in parts]  # here, where no device must be waited for
        parts = [to_device(part, self.device) for part in parts]
        train_mode(self.model)
        loss = float(self.optimizer.step(partial(self._closure, parts, counts)))  # type: ignore[arg-type]
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.progress.step + 1} of {self.steps}; try a lower train.lr")
        self.method.after_step(self.model, self.progress.step, self.steps)
        self.schedule.step()
        self.progress.step += 1
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """The model's own loss and the method's penalty, under the run's precision."""
        with autocast(self.cfg.precision, self.device):
            return self.model(**batch).loss.float() + self.method.penalty(self.model)

    def _closure(self, parts: list[Batch], counts: list[int]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        everywhere = max(distributed.total(sum(counts)), 1)
        total = torch.zeros((), device=self.device)
        with distributed.together(), distributed.own_draws(self.progress.step), in_step(self.model):
            for part, count in zip(parts, counts, strict=True):
                with offload.keeping(self.model, self.cfg.offload):
                    loss = self.loss(part) * (count / everywhere)
                if torch.is_grad_enabled():  # a zeroth-order optimizer asks for the loss alone
                    (loss * self._scale).backward()
                    fused.backward()
                total += loss.detach()
        distributed.add_up([total])
        if torch.is_grad_enabled():
            parameters = [*self.model.parameters()]
            distributed.add_up_gradients([p for p in parameters if p.requires_grad and not parted(p)])
            self._unscale_and_clip([p for p in parameters if p.grad is not None])
        return total

    @property
    def _scale(self) -> float:
        return self.progress.loss_scale if self.cfg.precision == "fp16" else 1.0

    def _unscale_and_clip(self, trained: list[nn.Parameter]) -> None:
        if self._scale != 1.0 and not unscaled(trained, self._scale):
            self.optimizer.zero_grad(set_to_none=True)  # skip this step and scale less
            self.progress.loss_scale /= 2
            return
        if self.cfg.clip is not None:
            clip(trained, self.cfg.clip)


def train(
    loop: Loop,
    batches: TrainBatches,
    *,
    evaluate: Callable[[], tuple[float, dict[str, float]]],
    timer: StepTimer,
    log: Callable[[int, dict[str, float | None]], None],
    tick: Callable[[], None],
) -> None:
    """Step until the end or until patience is out, scoring `val` on the way and keeping the best state.

    evaluate: the headline score (higher is better) and all metrics on `val`. tick: called after each step, to show
    progress, write checkpoints and stop. Raises Diverged, or what `tick` raises.
    """
    cfg, state = loop.cfg, loop.progress
    every = cfg.eval_every or batches.per_epoch
    log_every = max(1, loop.steps // 200)
    while True:
        due = state.step > 0 and (state.step % every == 0 or state.step == loop.steps)
        if due and state.evaluated != state.step:
            score, metrics = evaluate()
            _keep_best(loop, score, metrics)
            log(state.step, {f"val/{k}": v for k, v in metrics.items()})
        if state.step >= loop.steps or (cfg.patience is not None and state.stale >= cfg.patience):
            break
        parts = batches.micro(state.step, cfg.accumulate)
        rate = loop.schedule.get_last_lr()[0]
        with timer, distributed.together():
            loss = loop.step(parts)
        if state.step % log_every == 0 or state.step in (1, loop.steps):
            own: dict[str, Any] = {f"method/{k}": v for k, v in loop.method.numbers(loop.model).items()}
            log(state.step, own | {"train/loss": loss, "train/lr": rate})
        tick()


def _keep_best(loop: Loop, score: float, metrics: dict[str, float]) -> None:
    state = loop.progress
    state.evaluated, state.last_metrics = state.step, metrics
    if state.best_score is None or score > state.best_score:
        state.best_score, state.best_step, state.best_metrics, state.stale = score, state.step, metrics, 0
        if loop.cfg.select == "best":
            state.best_state = {n: t.to("cpu", copy=True) for n, t in trained_state(loop.model).items()}
            state.best_method = copy.deepcopy(loop.method.state(loop.model))
    else:
        state.stale += 1


def select(loop: Loop) -> int:
    """Give the model the state that `train.select` names; return its step."""
    state = loop.progress
    if loop.cfg.select == "best" and state.best_state is not None and state.best_step != state.step:
        loop.method.load_state(loop.model, state.best_method)
        with torch.no_grad():
            load_trained_state(loop.model, state.best_state)
    return state.best_step if loop.cfg.select == "best" and state.best_step is not None else state.step


def schedule(step: int, *, kind: str, warmup: int, steps: int) -> float:
    """The factor on the learning rate at optimizer step `step` (from 0): linear warm-up, then the decay `kind`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if kind == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1.0


def autocast(precision: str, device: torch.device) -> Any:
    """The autocast context of `train.precision`; none for fp32 and bf16_full."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; there its mask keeps the host's, so that nobody waits for the device to know the rows."""
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    mask = batch.get("attention_mask")
    if mask is not None and moved["attention_mask"] is not mask:
        moved["attention_mask"].host = mask  # type: ignore[attr-defined]
    return moved


class Stop:
    """What ends a run early: a signal, or the loss of its claim. A second SIGTERM or Ctrl-C ends the process at once."""

    def __init__(self, claim: Claim | None = None):
        self.claim, self.requested = claim, ""

    def __call__(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def check(self) -> None:
        """Raise Interrupted if a signal came, Claimed if the claim was seen to be lost."""
        if self.claim is not None and self.claim.lost:
            raise Claimed(self.claim.lost)
        if self.requested:
            raise Interrupted(f"stopped by {self.requested}; the same command goes on from the checkpoint")

    def owned(self) -> None:
        """Raise Claimed unless the claim is ours at this moment: before anything is written."""
        if self.claim is not None:
            self.claim.check()


@contextmanager
def stoppable(claim: Claim | None = None) -> Iterator[Stop]:
    """Listen to SIGNALS inside the block: in the main thread, or in one whose signals come from there (`turns.py`)."""
    stop, here = Stop(claim), member()
    with handling(stop), here.turns.listening(stop) if here else nullcontext():
        yield stop


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Give the signals that stop a run to `handler` inside the block, where this is the main thread."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handler) for s in SIGNALS}
    try:
        yield
    finally:
        for s, old in before.items():
            signal.signal(s, old)
