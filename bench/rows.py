"""The rows of a task, read and fingerprinted once per process: the cells of a sweep that share a task share its rows.

Kept for as long as the task, the data's configuration and every file of the mirror folders (time of change, size) stay
as they are. What the hub, its cache or a generator gave stays the same within a process. Real rows are mapped, not read,
so that what is kept takes little memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from bench.config import Config
from tasks import Rows
from tasks.data import MissingData, roots, stamp

if TYPE_CHECKING:
    from tasks import Task
    from tasks.data import DataConfig

TASKS = 16  # whose rows are kept; those used longest ago go first
_kept: OrderedDict[str, Rows] = OrderedDict()


def load(config: Config) -> Rows:
    """The rows of the run: what `config.task.load` gives, and raises; its splits and source are the caller's to change."""
    key = _key(config.task, config.data, config.seed)
    rows = _kept.pop(key, None) or config.task.load(config.data, config.seed)
    _kept[key] = rows
    while len(_kept) > TASKS:
        _kept.popitem(last=False)
    return Rows(dict(rows.splits), copy.deepcopy(rows.source))


def _key(task: Task, data: DataConfig, seed: int) -> str:
    """All that decides the rows."""
    drawn = seed if task.shots is not None else None
    return repr((type(task), dataclasses.asdict(task), data, drawn, _files(task, data)))


def _files(task: Task, data: DataConfig) -> list[Any]:
    """The mirror folders that rows may come from, with the state of their files."""
    if data.mode == "standin":
        return []
    paths = {task.path, *(other.path for other in task.other.values())}
    try:
        return [(str(root / path), stamp(root / path)) for root in roots(data) for path in sorted(paths)]
    except MissingData:  # no such folder: for `load` to say
        return []
