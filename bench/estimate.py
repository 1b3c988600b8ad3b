"""What a run will cost, counted on its model's shape before anything is fetched or run: FLOPs, parameters, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from bench.config import Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tasks import Task
    from tasks.data import DataConfig

TOKENS = 128  # of a row of text where no rows are at hand to be measured
CHARACTERS = 4.0  # per token of English
LOOKED_AT = 1024  # of the longest rows
KINDS = ("weights", "gradients", "optimizer", "activations")
ROW_BYTES = 40  # of a prediction on disk


@dataclass(frozen=True)
class Cost:
    """One run: FLOPs of everything, bytes, and how many optimizer steps. `note`: why it is skipped, or what is unknown.

    `memory` is what the record will call its peak: on a CPU bytes by kind, on a GPU the most that live at once.
    """

    steps: int = 0
    train: float = 0.0
    evaluate: float = 0.0
    trained: int = 0
    memory: int = 0
    disk: int = 0
    note: str = ""
    advice: str = ""  # where it exceeds the device's memory

    @property
    def flops(self) -> float:
        return self.train + self.evaluate


def cost(config: Config, *, gpu: bool = False) -> Cost:
    """Count one run, on a CPU or a GPU. Raises Unsupported where it would be skipped, UnknownShape where the model's size is not known."""
    from bench.shapes import UnknownShape

    task, train = config.task, config.train
    rows = row_counts(task, config.data)
    if not rows["train"] and train.steps is None:
        raise UnknownShape("how many rows the training data have is not published: give train.steps")
    steps = (
        train.steps
        if train.steps is not None
        else max(1, round((train.epochs or 0) * math.ceil(rows["train"] / train.batch_size)))
    )
    micro = -(-train.batch_size // train.accumulate)
    mean, _ = lengths(config)
    usual, most = [mean] * micro, longest(config, micro)
    peak = _counted(config, most, gpu=gpu, at_once=gpu)
    one = _counted(config, usual, gpu=gpu) if usual != most else peak
    evaluations = (
        (steps // train.eval_every if train.eval_every else max(1, math.ceil(train.epochs or 1))) if steps else 1
    )
    scored = rows["val"] * evaluations + rows["test"] * (config.test != "locked")
    forward = one["forward"] / micro
    new = task.max_new_tokens if task.phase == "generation" else 0
    generated = forward / mean * new  # with a cache: a forward of one token each
    return Cost(
        steps=steps,
        train=float(steps * train.accumulate * one["train_step"]),
        evaluate=scored * (forward + generated),
        trained=one["trained_params"],
        memory=peak["live"] if gpu else sum(peak[kind] for kind in KINDS),
        disk=one["stored_bytes"] * config.save_state + ROW_BYTES * (rows["val"] + rows["test"]),
    )


def _counted(config: Config, lengths: Sequence[int], **options: bool) -> dict[str, int]:
    """The `footprint` of a micro-batch of rows of these lengths.

    All of it is linear in the number of classes, so that many data sets of one kind need two countings.
    """
    from bench.depth import along, counted

    labels = getattr(config.task, "labels", 0)
    if labels <= 3:  # one is a regression: another loss
        return counted(config, lengths, **options)
    two, three = (_counted(_with_labels(config, n), lengths, **options) for n in (2, 3))
    return along(config, two, three, labels - 2)


def _with_labels(config: Config, labels: int) -> Config:
    return replace(config, task=replace(config.task, labels=labels))


@cache
def _sizes(protocol: str, splits: tuple[Any, ...], sizes: tuple[Any, ...], holdout: int) -> dict[str, int]:
    from tasks.splits import cut

    return {k: len(v) for k, v in cut(protocol, dict(splits), dict(sizes), holdout)[0].items()}


def row_counts(task: Task, data: DataConfig | None = None) -> dict[str, int]:
    """Rows of train, val and test by the published sizes of the data; where there are none, those that can be had here."""
    from tasks.data import DataConfig

    data = data or DataConfig()
    if not task.sizes or data.mode == "standin":
        return {k: len(v) for k, v in task.load(data).splits.items()}
    found = _sizes(task.protocol, tuple(task.splits.items()), tuple(task.sizes.items()), task.holdout)
    if "train" in task.other:  # rows of another data set
        found["train"] = (task.other["train"].sizes or {}).get("train", 0)
    limited = {k: min(n, task.limit.get(k) or n) for k, n in found.items()}
    if task.shots is not None:
        limited["train"] = min(limited["train"], task.shots * task.options().get("num_labels", 1))
    return limited


def lengths(config: Config) -> tuple[int, int]:
    """Mean and largest tokens of a training row; an image is one. Without rows at hand: TOKENS, and all that is allowed."""
    if config.task.kind == "image":
        return 1, 1
    allowed = min(config.model.max_length or 512, config.task.max_length)
    if not (found := _characters(config)):
        return min(allowed, TOKENS), allowed
    return _tokens(config, found[0], allowed), _tokens(config, found[1], allowed)


def longest(config: Config, rows: int) -> list[int]:
    """Tokens of the `rows` longest training rows, longest first."""
    whole, found = lengths(config)[1], _characters(config)[1 : 1 + rows] if config.task.kind != "image" else ()
    each = [_tokens(config, n, whole) for n in found]
    return each + [each[-1] if each else whole] * (rows - len(each))


def _tokens(config: Config, characters: float, allowed: int) -> int:
    each = 1.0 if config.model.path.startswith("random:") else CHARACTERS  # these read bytes
    return min(allowed, max(8, round(characters / each) + 3))


_lengths: dict[str, tuple[float, ...]] = {}  # of a task's rows, which take a while to be looked for


def _characters(config: Config) -> tuple[float, ...]:
    """Mean characters of a training row, and those of the longest ones; nothing where no rows can be had here."""
    key = repr((config.task, config.data))
    if key not in _lengths:
        _lengths[key] = _measured(config.task, config.data)
    return _lengths[key]


def _measured(task: Task, data: DataConfig) -> tuple[float, ...]:
    from tasks.data import MissingData

    try:
        rows = task.load(data if data.mode == "standin" else replace(data, mode="real")).splits["train"]
    except (MissingData, ValueError):
        return ()
    texts = rows.to_pandas().drop(columns="row_id").astype(str)
    found = texts.apply(lambda column: column.str.len()).sum(axis=1)
    return float(found.mean()), *found.nlargest(LOOKED_AT).astype(float)
