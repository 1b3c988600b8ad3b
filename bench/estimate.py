"""What a run will cost, counted on its model's shape before anything is fetched or run: FLOPs, parameters, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from bench.config import Config

if TYPE_CHECKING:
    from torch import nn

    from tasks import Task
    from tasks.data import DataConfig

TOKENS = 128  # of a row of text where no rows are at hand to be measured
CHARACTERS = 4.0  # per token of English
ROW_BYTES = 40  # of a prediction on disk


@dataclass(frozen=True)
class Cost:
    """One run: FLOPs of everything, bytes, and how many optimizer steps. `note`: why it is skipped, or what is unknown."""

    steps: int = 0
    train: float = 0.0
    evaluate: float = 0.0
    trained: int = 0
    memory: int = 0
    disk: int = 0
    note: str = ""

    @property
    def flops(self) -> float:
        return self.train + self.evaluate


def cost(config: Config) -> Cost:
    """Count one run. Raises Unsupported where it would be skipped, UnknownShape where the model's size is not known."""
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
    mean, longest = lengths(config)
    one = _counted(config, micro, mean, longest)
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
        trained=one["trained"],
        memory=one["memory"],
        disk=one["stored"] * config.save_state + ROW_BYTES * (rows["val"] + rows["test"]),
    )


def _counted(config: Config, rows: int, tokens: int, longest: int) -> dict[str, int]:
    """What the shape of the model says: FLOPs of a micro-batch, parameters, bytes at the longest rows.

    All of them are linear in the number of classes, so that many data sets of one kind need two countings.
    """
    labels = getattr(config.task, "labels", 0)
    if labels <= 3:  # one is a regression: another loss
        return _shape(config, rows, tokens, longest)
    two, three = (_shape(_with_labels(config, n), rows, tokens, longest) for n in (2, 3))
    return {key: two[key] + (labels - 2) * (three[key] - two[key]) for key in two}


def _with_labels(config: Config, labels: int) -> Config:
    return replace(config, task=replace(config.task, labels=labels))


_known: dict[str, dict[str, int]] = {}  # data sets of one kind differ in their rows alone


def _shape(config: Config, rows: int, tokens: int, longest: int) -> dict[str, int]:
    from bench.model import counts

    task = config.task
    key = repr((config.method, config.model, task.model_class, task.options(), rows, tokens, longest))
    if key not in _known:
        model, head = _applied(config)
        kept, one = counts(model, head), _probe(model, config, rows, tokens)
        peak = one if longest <= tokens else _probe(model, config, rows, longest)
        memory = _bytes(model, config.method.backward) + peak["activations"]
        _known[key] = one | {"trained": kept["trained_params"], "stored": kept["stored_bytes"], "memory": memory}
    return _known[key]


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
    each = 1.0 if config.model.path.startswith("random:") else CHARACTERS  # these read bytes
    mean, longest = (min(allowed, max(8, round(n / each) + 3)) for n in found)
    return mean, longest


_lengths: dict[str, tuple[float, ...]] = {}  # of a task's rows, which take a while to be looked for


def _characters(config: Config) -> tuple[float, ...]:
    """Mean and largest characters of a training row; nothing where no rows can be had here."""
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
    return float(found.mean()), float(found.max())


def _applied(config: Config) -> tuple[nn.Module, set[int]]:
    """The model from its shape, with the method applied; ids of the head's parameters."""
    import torch

    from bench.shapes import skeleton

    model = skeleton(config.model, config.task)
    head = {id(p) for p in model.parameters() if p.requires_grad}
    method = config.method
    if getattr(method, "start", None) == "fisher":  # looks at data and weights; counts are the same
        method = replace(method, start="random")
    with torch.device("meta"):
        model = method.apply(model, iter(()))
    return model, head


def _probe(model: nn.Module, config: Config, rows: int, tokens: int) -> dict[str, int]:
    """FLOPs and activations of one micro-batch of `rows` x `tokens`."""
    from bench import measure

    batch = _batch(model, config, rows, tokens)
    return measure.probe(model, batch, lambda b: model(**b).loss, backward=config.method.backward)


def _batch(model: Any, config: Config, rows: int, tokens: int) -> dict[str, Any]:
    import torch

    with torch.device("meta"):
        if config.task.kind == "image":
            size = model.config.image_size
            pixels = torch.zeros(rows, 3, size, size)
            return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        one = not config.task.model_class.endswith(("LM", "LMHeadModel"))  # one label a row, or one a token
        real = one and config.task.options().get("num_labels") == 1
        labels = torch.zeros(rows, dtype=torch.float if real else torch.long) if one else ids
        return {"input_ids": ids, "labels": labels}


def _bytes(model: nn.Module, backward: bool) -> int:
    """Weights; of what is trained, gradients and the two moments of AdamW."""
    kept = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return kept + trained * (3 if backward else 0)
