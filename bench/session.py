"""The middle of a run: train, evaluate, select; what it costs; checkpoints on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import checkpoint, distributed, measure
from bench.batches import TrainBatches
from bench.config import Config
from bench.model import trained_parameters
from bench.parts import parted
from bench.prepare import Prepared
from bench.record import Record
from bench.track import Tracker
from bench.train import Interrupted, Loop, Stop, select, train

if TYPE_CHECKING:
    import pandas as pd

    Scored = tuple[pd.DataFrame, dict[str, float]]

log = logging.getLogger("bench")


class Costs:
    """The clocks and meters of one run."""

    def __init__(self, device: torch.device):
        self.phases, self.steps, self.energy = measure.Phases(device), measure.StepTimer(device), measure.Energy(device)

    def state(self) -> list[Any]:
        """What a checkpoint keeps of them; plain JSON."""
        return [part.state() for part in (self.phases, self.steps, self.energy)]

    def load_state(self, state: list[Any]) -> None:
        """Add what the process that was stopped had counted."""
        parts: tuple[Any, ...] = (self.phases, self.steps, self.energy)
        for part, values in zip(parts, state, strict=True):
            part.load_state(values)

    @contextmanager
    def peak_of_failure(self, record: Record) -> Iterator[None]:
        """Leave in the record how much memory was in use where the block runs out of it."""
        try:
            yield
        except Exception as error:
            if measure.out_of_memory(error):
                record.memory = measure.peaks(self.phases)
            raise


class Every:
    """True once each `seconds`; never where `seconds` is null."""

    def __init__(self, seconds: float | None):
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self) -> bool:
        if self.seconds is None or time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


@dataclass
class Session:
    """One training from its start, or its checkpoint, to the scores of val and test."""

    record: Record
    config: Config
    ready: Prepared
    loop: Loop
    costs: Costs
    tracker: Tracker
    stop: Stop

    def __post_init__(self) -> None:
        self.folder = Path(self.config.results) / self.record.id
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.due = Every(self.config.train.checkpoint_seconds)
        self.scored: dict[int, Scored] = {}  # the best and the last scoring of val, by step
        self.dynamics = None
        if self.config.spectra_every and not distributed.rank():
            from analysis.dynamics import Dynamics

            self.dynamics = Dynamics(self.config, self.folder)

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        if self.checkpoint.exists():
            extra = checkpoint.load(self.checkpoint, self.loop)
            self.costs.load_state(extra["costs"])
            self.record.history = extra["history"]
            log.info("%s: going on from step %d of %d", self.record.id, self.loop.progress.step, self.loop.steps)
        self.bar = progress_bar(self.record, self.loop)

    def save(self) -> None:
        """Write the checkpoint. Raises Claimed where another worker has the run now."""
        with distributed.together():
            self.stop.owned()
        checkpoint.save(self.checkpoint, self.loop, {"costs": self.costs.state(), "history": self.record.history})

    def go(self, batches: TrainBatches, cost: dict[str, int]) -> dict[str, Scored]:
        """Train, select, finish; predictions and metrics of val, test and the other tasks' rows. Raises Interrupted, with a checkpoint.

        cost: what `measure.probe` found.
        """
        loop, method, record = self.loop, self.ready.method, self.record
        final = method.finishes  # the model changes shape: no checkpoint after that
        finished = False
        try:
            if self.config.train.features == "auto" and loop.steps > batches.per_epoch:
                from bench import features

                record.data["features"] = features.use(self.ready, self.config, self.costs.phases, self.stop)
            with self.bar:
                with self.costs.phases("train"):
                    timer = self.costs.steps
                    train(loop, batches, evaluate=self.evaluate, timer=timer, log=self.note, tick=self.tick)
                distributed.check_alike(p for p in trained_parameters(loop.model).values() if not parted(p))
                kinds: Any = {k: cost[k] for k in ("activations", "offloaded") if k in cost}
                kinds["backward"] = method.backward
                record.memory = measure.memory(loop.model, loop.optimizer, self.costs.phases, **kinds)
                distributed.mark(record)
                record.selected_step = select(loop)
                if final:
                    self.save()
                method.finish(self.ready.model)
                finished = True
                val = None if final else self.scored.get(record.selected_step)  # unchanged since: not scored twice
                scored = {"val": val or self.score("val")}
                return scored | {s: self.score(s) for s in self.ready.task.scored() if s in self.ready.encoded}
        except Interrupted:
            if not (final and finished):
                self.save()
            raise

    def note(self, step: int, values: dict[str, float | None]) -> None:
        """Keep values of an optimizer step."""
        self.record.history.append({"step": step, **values})
        self.tracker.log(step, values)

    def tick(self) -> None:
        """After each step: show progress, stop where asked to, write a checkpoint where one is due."""
        self.bar.update(self.loop.progress.step - self.bar.n)
        if self.dynamics is not None and self.dynamics.due(self.loop.progress.step):
            with self.costs.phases("spectra"):
                self.note(self.loop.progress.step, self.dynamics.look(self.loop.model, self.loop.progress.step))
        with distributed.together():
            self.stop.check()
        with distributed.together():
            if distributed.total(self.due() and not distributed.rank()):  # by the first one's clock
                self.save()

    def score(self, split: str) -> Scored:
        """Predictions and metrics of `split`."""
        self.bar.set_postfix_str(f"scoring {split}")
        task = self.ready.task.task_of(split)
        with self.costs.phases(task.phase):
            predictions = self.ready.predict(split, self.config, self.stop)
        self.bar.set_postfix_str("")
        return predictions, task.score(predictions)

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """The headline score and all metrics of val."""
        step, best = self.loop.progress.step, self.loop.progress.best_step
        self.scored = {s: scored for s, scored in self.scored.items() if s == best} | {step: self.score("val")}
        metrics = self.scored[step][1]
        return metrics[self.ready.task.metric], metrics


def progress_bar(record: Record, loop: Loop) -> Any:
    """A bar over the optimizer steps, shown on a terminal and in logs alike."""
    from tqdm import tqdm

    return tqdm(
        total=loop.steps,
        initial=loop.progress.step,
        desc=record.cell,
        unit="step",
        mininterval=1.0,
        leave=False,
        disable=distributed.rank() > 0,
    )
