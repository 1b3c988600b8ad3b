"""Threads that take turns: of several runs in one process one is at work at any time, and all that is global is its alone.

A run keeps its turn until it asks something of all of them (`Member.meet`), or ends. Once every run that is still there
has asked, one thread answers for those that asked the same. The random generators of the process change hands with the
turn, and so does what the caller names in `keeps`; a run's clock (`clock.now`) stands still while others are at work, but
for its equal share of what was answered together. What is answered together has all of torch's threads, a run's own work one:
every Python thread has threads of OpenMP of its own, which would go on waiting, at full speed, into the turns of the others.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench import clock, matmul

log = logging.getLogger("bench")
_here = threading.local()
Kept = tuple[Callable[[], Any], Callable[[Any], None]]  # reads and writes a global value that each run has for itself


class Again(BaseException):
    """Ends a member's body, which then begins anew, apart from the others. No `except Exception` may keep it."""


class Request:
    """What a member asks of all. Those whose `key` is the same are answered together; `urgent` ones first."""

    key: Any = None
    urgent = False


def member() -> Member | None:
    """The member whose thread this is."""
    return getattr(_here, "member", None)


class Member:
    """One thread. `alone`: it meets the others no more."""

    def __init__(self, turns: Turns, body: Callable[[], Any], index: int):
        self.turns, self.body, self.index = turns, body, index
        self.alone = False
        self.request: Request | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.draws = Draws()
        self._kept = [read() for read, _ in turns.keeps]
        self._answer: Any = None
        self._share = 0.0
        self._leads: list[Member] = []
        self._wake = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, daemon=True, name=f"run {index}")

    def meet(self, request: Request) -> Any:
        """Wait until all have asked; the answer. Raises Again where there can be none."""
        self.request = request
        self._yield()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def answer(self, value: Any) -> None:
        """Let the member go on with `value` when its turn comes."""
        self.request, self._answer = None, value
        self.turns.ready.append(self)

    def _live(self) -> None:
        self._wake.acquire()
        _here.member = self
        self._resume()
        try:
            self.result = self._attempt()
        except BaseException as error:
            self.error = error
        self.turns.leave(self)

    def _attempt(self) -> Any:
        try:
            return self.body()
        except Again:
            self.alone = True
        self.turns.ready.append(self)  # behind the others, who end first what they have begun
        self._yield()
        return self.body()

    def _yield(self) -> None:
        self.draws.take()
        self._kept = [read() for read, _ in self.turns.keeps]
        since = time.perf_counter()
        self.turns.next()
        self._wake.acquire()
        if group := self._leads:
            self._leads = []
            self.turns.lead(group)
            self.turns.ready.remove(self)
        clock.stand_still(time.perf_counter() - since - self._share)
        self._share = 0.0
        self._resume()

    def _resume(self) -> None:
        matmul.threads(self.turns.threads if self.alone else 1)
        self.draws.give()
        for (_, write), value in zip(self.turns.keeps, self._kept, strict=True):
            write(value)


class Turns:
    """Runs `bodies` to their ends. `respond` answers members that asked the same: it calls `answer` on each."""

    def __init__(self, respond: Callable[[list[Member]], None], keeps: Sequence[Kept] = ()):
        self.respond, self.keeps = respond, keeps
        self.members: list[Member] = []
        self.ready: deque[Member] = deque()
        self.held: list[Member] = []  # whose requests wait until the others have ended
        self.size = 0  # how many of those held go on at once
        self.threads = torch.get_num_threads()  # of torch, for what is answered together
        self._home = threading.Semaphore(0)
        self._listening: list[Callable[[int, Any], None]] = []
        self._signals: list[int] = []

    def run(self, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of `bodies`, in their order. Raises the first error that a body raises, after all have ended."""
        self.members = [Member(self, body, k) for k, body in enumerate(bodies)]
        own, kept, numpy = Draws(), [read() for read, _ in self.keeps], np.random.get_bit_generator()  # type: ignore[attr-defined]
        self.ready.extend(self.members)
        for m in self.members:
            m._thread.start()
        self.next()
        self._home.acquire()
        own.give()
        torch.set_num_threads(self.threads)
        np.random.set_bit_generator(numpy)  # type: ignore[attr-defined]
        for (_, write), value in zip(self.keeps, kept, strict=True):
            write(value)
        for m in (m for m in self.members if m.error is not None):
            raise m.error  # type: ignore[misc]
        return [m.result for m in self.members]

    def next(self) -> None:
        """Give the turn to a member that can go on; where all wait, to one that answers; after the last, to the caller."""
        if self.ready:
            self.ready.popleft()._wake.release()
        elif group := self._group():
            group[0]._leads = group
            group[0]._wake.release()
        else:
            self._home.release()

    def lead(self, group: list[Member]) -> None:
        """Answer `group`; where that fails, every member begins anew, one after the other. Runs in the thread of the first."""
        since = time.perf_counter()
        matmul.threads(self.threads)
        try:
            self.respond(group)
        except Exception as error:
            self.fail(error)
        for m in group:
            m._share = (time.perf_counter() - since) / len(group)

    def fail(self, error: Exception) -> None:
        """Let all members that wait begin anew, apart."""
        log.warning("every run begins anew, alone: %s: %s", type(error).__name__, error, exc_info=error)
        self.held = []
        for m in self.members:
            m.alone = True
            if m.request is not None:
                m.answer(Again(str(error)))

    def leave(self, gone: Member) -> None:
        """A member has ended: give its turn away."""
        gone.draws.take()
        self.next()

    def hold(self, members: list[Member], size: int) -> None:
        """Leave these waiting until the others have ended; then `size` of them go on, and so forth."""
        self.held, self.size = members, size

    def _group(self) -> list[Member]:
        waiting = [m for m in self.members if m.request is not None]
        if waiting and len(waiting) == len(self.held):
            self.held = self.held[self.size :]
        waiting = [m for m in waiting if m not in self.held]
        first = min(waiting, key=lambda m: not m.request.urgent, default=None)  # type: ignore[union-attr]
        return [m for m in waiting if first and m.request.key == first.request.key]  # type: ignore[union-attr]

    @contextmanager
    def listening(self, handler: Callable[[int, Any], None]) -> Iterator[None]:
        """Tell `handler` of the signals that came, and of those that come inside the block."""
        for number in self._signals:
            handler(number, None)
        self._listening.append(handler)
        try:
            yield
        finally:
            self._listening.remove(handler)

    def signal(self, number: int, frame: Any) -> None:
        """A signal, for all runs: what the main thread's handler is."""
        self._signals.append(number)
        for handler in [*self._listening]:
            handler(number, frame)


class Draws:
    """The states of the random generators while others have the turn; `torch` may be drawn from meanwhile."""

    def __init__(self) -> None:
        self.torch = torch.Generator()
        self.numpy = np.random.MT19937()
        self.numpy.state = np.random.get_bit_generator().state  # type: ignore[attr-defined, assignment]
        self.cuda: torch.Tensor | None = None
        self.take()

    def take(self) -> None:
        """Keep the state of the process."""
        self.torch.set_state(torch.get_rng_state())
        self.python = random.getstate()
        if torch.cuda.is_initialized():
            self.cuda = torch.cuda.get_rng_state()

    def give(self) -> None:
        """Make it the state of the process, where numpy draws from now on from a generator of its own."""
        torch.set_rng_state(self.torch.get_state())
        np.random.set_bit_generator(self.numpy)  # type: ignore[attr-defined]
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """What draws from torch's global generators inside the block draws from these."""
        torch.set_rng_state(self.torch.get_state())
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        yield
        self.torch.set_state(torch.get_rng_state())
        if torch.cuda.is_initialized():
            self.cuda = torch.cuda.get_rng_state()
