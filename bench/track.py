"""Mirror of a run in Weights & Biases. The run never depends on it: no prompt, no long wait, no exception.

One W&B run per record. What is sent is a copy; nothing is ever read back.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from bench.record import Record

MODES = ("auto", "online", "offline", "off")
TIMEOUT = 20  # seconds that a server may take to answer


class Tracker:
    """Writes to one W&B run, or to none. After the first failure it warns and stays silent."""

    def __init__(self, run: Any = None):
        self._run = run

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Values at an optimizer step; None is left out."""
        self._try(lambda run: run.log({k: v for k, v in values.items() if v is not None}, step=step))

    def finish(self, record: Record) -> None:
        """The record's results as the summary, and the end of the W&B run."""
        self._try(lambda run: run.summary.update(summary(record)))
        self.close(0 if record.status in ("ok", "skipped") else 1)

    def close(self, exit_code: int = 1) -> None:
        """End the W&B run if it is still open; it counts as failed unless `finish` ended it."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, act: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # whatever it is, the run is worth more than its mirror
            warnings.warn(f"W&B tracking stops: {_first_line(error)}", stacklevel=3)
            self._run = None


@contextmanager
def track(mode: str, record: Record, folder: Path, *, project: str = "paretune") -> Iterator[Tracker]:
    """A tracker of `record`, writing under `folder/wandb`.

    `mode` is "off" (wandb is not even imported), "offline", "online", or "auto": online where a key is configured, else
    offline. A server that does not answer in 20 s makes it offline; where that fails too, nothing is tracked.
    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"wandb={mode!r}: choose one of {', '.join(MODES)}")
    tracker = Tracker(None if mode == "off" else start(mode, Path(folder), **_names(record, project)))
    try:
        yield tracker
    finally:
        tracker.close()


def summary(record: Record) -> dict[str, Any]:
    """The record's results as flat `group/key` pairs, without nulls."""
    plain = ("status", "reason", "metric", "score", "selected_step", "steps", "trained_params", "head_params")
    flat = {name: getattr(record, name) for name in (*plain, "stored_params", "stored_bytes", "total_params")}
    flat |= record.metrics
    for group in ("memory", "time", "flops", "energy"):
        flat |= {f"{group}/{k}": v for k, v in getattr(record, group).items()}
    return {k: v for k, v in flat.items() if v is not None}


def has_key() -> bool:
    """Whether a W&B key is configured: WANDB_API_KEY, or a login in the netrc file. Never asks, never connects."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        file = Path(path).expanduser() if path else None
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if file is not None and netrc.netrc(str(file)).authenticators(host):
                return True
    return False


def start(mode: str, folder: Path, **what: Any) -> Any:
    """A W&B run under `folder/wandb`; offline after a failure online, None after a failure offline. `what`: of wandb.init."""
    online = mode == "online" or (mode == "auto" and has_key())
    if online and not has_key():  # W&B would ask for it, on a terminal for ever
        warnings.warn("wandb=online but no key: set WANDB_API_KEY or run `wandb login`; tracking offline", stacklevel=4)
        online = False
    for attempt in ("online", "offline") if online else ("offline",):
        try:
            return _init(attempt, folder, **what)
        except Exception as error:  # network, account, disk: the run goes on
            then = "tracking offline" if attempt == "online" else "not tracking"
            warnings.warn(f"W&B {attempt} did not start ({_first_line(error)}); {then}", stacklevel=4)
    return None


def _init(mode: str, folder: Path, **what: Any) -> Any:
    if os.environ.get("WANDB_MODE") == "":  # W&B takes an empty value for a wrong one
        del os.environ["WANDB_MODE"]
    import wandb

    folder.mkdir(parents=True, exist_ok=True)  # W&B falls back to a temporary folder where there is none
    settings = wandb.Settings(
        init_timeout=TIMEOUT,
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    return wandb.init(mode=mode, dir=str(folder), reinit="create_new", settings=settings, **what)  # type: ignore[arg-type]


def _names(record: Record, project: str) -> dict[str, Any]:
    """What names the W&B run of a record, for `wandb.init`."""
    return {
        "id": f"{record.id}-{secrets.token_hex(3)}",  # a repeated run of one record is another W&B run
        "project": project,
        "name": f"{record.method} {record.model} {record.task} {record.seed}",
        "group": record.experiment or f"{record.method}-{record.task}",
        "job_type": "run",
        "tags": [record.method[:64], record.model[-64:], record.task[:64]],
        "config": {**record.config, "id": record.id},
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
