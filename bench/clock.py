"""Seconds and peaks: of the phases of a run, and of its optimizer steps."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

_still = threading.local()


def now() -> float:
    """Seconds, without those for which the clock of this thread stood still."""
    return time.perf_counter() - getattr(_still, "seconds", 0.0)


def stand_still(seconds: float) -> None:
    """Take `seconds` off this thread's clock: others were at work (`turns.py`)."""
    _still.seconds = getattr(_still, "seconds", 0.0) + seconds


class Phases:
    """Seconds, and peak allocated CUDA bytes, by named phase: `with phases("train"): ...`.

    Phases nest: an evaluation inside training counts as evaluation only. One name may be entered many times: seconds add
    up, the highest peak stays. The device is synchronised at every border.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int | None] = {}
        self.fused = 1  # runs that were trained at once
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._border()
        self._open.append(name)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def _border(self) -> None:
        """Book what happened since the last border to the innermost open phase."""
        synchronize(self.device)
        moment, cuda = now(), self.device.type == "cuda"
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + moment - self._since
            peak = torch.cuda.max_memory_allocated(self.device) if cuda else None
            self.peaks[name] = max(self.peaks.get(name) or 0, peak) if peak is not None else self.peaks.get(name)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since = now()

    @property
    def total(self) -> float:
        """Seconds in all phases."""
        return sum(self.seconds.values())

    def state(self) -> dict[str, Any]:
        """What `load_state` adds to the phases of the process that resumes; plain JSON."""
        return {"seconds": dict(self.seconds), "peaks": dict(self.peaks), "fused": self.fused}

    def load_state(self, state: dict[str, Any]) -> None:
        self.fused = max(self.fused, state.get("fused", 1))
        for name, seconds in state["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            peaks = [p for p in (state["peaks"].get(name), self.peaks.get(name)) if p is not None]
            self.peaks[name] = max(peaks, default=None)


class StepTimer:
    """Seconds of each optimizer step, device synchronised: `with steps: ...` around one step."""

    WARM_UP = 3  # steps at least; or a tenth of them

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.sessions: list[list[float]] = [[]]  # one list per process: a resumed run warms up again

    def __enter__(self) -> Self:
        synchronize(self.device)
        self._start = now()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            synchronize(self.device)
            self.sessions[-1].append(now() - self._start)

    @property
    def samples(self) -> list[float]:
        """The durations after each session's warm-up: its first 3 steps, or its first tenth if that is more."""
        return [t for s in self.sessions for t in s[max(self.WARM_UP, math.ceil(len(s) / 10)) :]]

    @property
    def median(self) -> float | None:
        """Median seconds per step; None before any step after the warm-up."""
        return statistics.median(self.samples) if self.samples else None

    def state(self) -> list[list[float]]:
        """Plain JSON for `load_state`."""
        return [list(s) for s in self.sessions]

    def load_state(self, state: list[list[float]]) -> None:
        self.sessions = [*(list(s) for s in state), []]


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def times(phases: Phases, steps: StepTimer) -> dict[str, float | None]:
    """The record's `time`: seconds by phase and in total, median seconds per step and the number of steps behind it."""
    by_phase = {name: phases.seconds.get(name) for name in ("setup", "train", "eval", "generation")}
    return {
        **by_phase,
        "total": phases.total - phases.seconds.get("spectra", 0.0),  # looking at the training is no cost of the method
        "step": steps.median,
        "step_samples": len(steps.samples),
    }
