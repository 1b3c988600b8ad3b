"""What a task is: which rows it trains, selects and tests on, how a row becomes model inputs, how a model is scored.

Code is per kind of task (`classification.py`, `generation.py`, `image.py`); values are in `conf/task/NAME.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from tasks import borrowed, checks
from tasks import splits as cutting
from tasks.data import DataConfig, MissingData, Public, public, standin_warning
from tasks.fingerprint import fingerprint

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from torch import Tensor, nn

    Batch = dict[str, Tensor]

T = TypeVar("T", bound="type[Task]")
Row = dict[str, Any]


@dataclass
class Rows:
    """The rows of one task: splits `train`, `val`, `test`, and those of `other`, each with an int64 column `row_id`."""

    splits: dict[str, Dataset]
    source: dict[str, Any]


@dataclass
class Task:
    """The protocol. A kind of task implements `options`, `columns`, `encode`, `collate`, `predict`, `score`, `example`."""

    version: int = 1  # raise it whenever the numbers of this task change their meaning
    path: str = MISSING  # hub id of the data set
    name: str | None = None  # its configuration
    revision: str | None = None  # commit of the hub's repository; null: its main branch
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "val": "validation", "test": "test"})
    protocol: str = "official"  # see `tasks/splits.py`: official, leakfree, devset, heldout, threeway, vtab1k
    holdout: int = 1000  # rows (or units) of val under `heldout`, of val and of test under `threeway`
    unit: str | None = None  # column (or column.key) whose rows of the same value stay together in one split
    limit: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(cutting.SPLITS))  # rows, at most
    shots: int | None = None  # few-shot: so many training rows per class, drawn by the seed of the run
    other: dict[str, Any] = field(default_factory=dict)  # tasks whose rows it takes, by split; see `tasks/borrowed.py`
    made_from: str | None = None  # for an `other.train`: the column that holds the text which a row was made from
    overlaps: list[str] = field(default_factory=list)  # data sets (path/name) that share rows with this one
    metric: str = MISSING  # the headline: a key of `score`; higher is better
    standin: str = MISSING  # generator of `tasks/standin.py` for machines that cannot have the real rows
    licence: str = "see the data set's card"
    sizes: dict[str, int] = field(default_factory=dict)  # rows of the public splits under their own names, as published
    suite: str | None = None  # what the task is a member of: vtab, glue, ...; its average is `analysis.suites`
    group: str | None = None  # the part of the suite

    kind: ClassVar[str]
    phase: ClassVar[str] = "eval"  # what an evaluation's seconds and memory are booked as: eval or generation
    collated: ClassVar[bool] = True  # whether `predict` gives the model the batches that it is given
    model_class: ClassVar[str]  # name of the transformers class that builds the model with the right head
    head: ClassVar[tuple[str, ...]] = ()  # how names of head parameters start where no checkpoint says what is new
    metrics: ClassVar[tuple[str, ...]] = ()  # what `metric` may be

    def __post_init__(self) -> None:
        """Raises ValueError for a protocol, split or metric that does not exist, or another kind of task in `other`."""
        choose("task.protocol", self.protocol, cutting.PROTOCOLS)
        choose("task.metric", self.metric, self.metrics)
        for given in (self.splits, self.limit):
            for split in given:
                choose("task.splits and task.limit", split, cutting.SPLITS)
        if self.protocol == "fewshot" and self.shots is None:
            raise ValueError("task.protocol=fewshot needs task.shots, the training rows per class")
        for split, other in self.other.items():
            if split in ("val", "test") or not isinstance(other, (dict, type(self))):
                raise ValueError(f"task.other.{split}: takes train or a new name, and a task of kind {self.kind!r}")
        self.other = {s: type(self)(**o) if isinstance(o, dict) else o for s, o in self.other.items()}

    def task_of(self, split: str) -> Any:
        """The task whose templates and metrics the rows of `split` have: this one, or the one in `other`."""
        return self.other.get(split, self)

    def scored(self) -> list[str]:
        """The splits that are scored once, at the selected checkpoint."""
        return ["test", *(split for split in self.other if split != "train")]

    def expected(self) -> dict[str, int] | None:
        """Rows of train, val and test as the protocol cuts the published `sizes`; None where those are not known."""
        if self.unit or self.other or self.shots or not set(self.splits.values()) <= set(self.sizes):
            return None
        chosen, _ = cutting.cut(self.protocol, self.splits, self.sizes, self.holdout)
        return {s: len(cutting.subset(ids, self.limit.get(s))) for s, ids in chosen.items()}

    def options(self, config: Any = None) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; `config` is the checkpoint's own."""
        return {}

    def columns(self) -> list[str]:
        """The columns that the task reads; they make the fingerprint."""
        raise NotImplementedError

    def target(self) -> str | None:
        """The column of integer classes, where there is one: few-shot draws are balanced over it."""
        return None

    def example(self, rng: Any) -> Row:
        """One generated row with this task's columns, for the stand-in. `rng` is a `random.Random`."""
        raise NotImplementedError

    def check(self, rows: Dataset, split: str) -> None:
        """Raise ValueError for rows that this kind of task could not score; see `tasks/checks.py` for the rest."""

    def encode(self, row: Row, processor: Any) -> Row:
        """One row as lists or arrays of model inputs, with `labels`."""
        raise NotImplementedError

    def collate(self, rows: list[Row], processor: Any) -> Batch:
        """Encoded rows as one padded batch of tensors, with `labels`."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batches: Iterable[tuple[Batch, list[Row]]], processor: Any) -> pd.DataFrame:
        """One line per row: row_id, label, prediction, score. `batches` yields collated rows with the rows of the data.

        The model is put in eval mode, no gradients are kept. Raises FloatingPointError where outputs are not finite.
        """
        raise NotImplementedError

    def score(self, predictions: pd.DataFrame) -> dict[str, float]:
        """The metrics of `predict`'s table; pure. `self.metric` is one of the keys."""
        raise NotImplementedError

    def load(self, data: DataConfig, seed: int = 0) -> Rows:
        """The rows under this task's protocol; `seed` draws `shots` and nothing else.

        Raises MissingData where `data.mode` is `real` and nothing can be had, ValueError for rows without labels.
        """
        found = self.public(data)
        splits, protocol = self._cut(found, seed)
        more, extra = borrowed.borrow(self, found, splits, data)
        splits |= more
        protocol += "".join(f"; {s}: {len(more[s])} rows of {other.path}" for s, other in self.other.items())
        self._check(splits)
        counts = checks.check(self, splits)
        return Rows(splits, self._source(found, splits, protocol) | {"counts": counts, "other": extra})

    def _cut(self, found: Public, seed: int) -> tuple[dict[str, Dataset], str]:
        """Train, val and test under the protocol, and a sentence that says so."""
        units = {name: self._units(rows) for name, rows in found.splits.items() if name in self.splits.values()}
        sizes = {name: len(units.get(name, rows)) for name, rows in found.splits.items()}
        chosen, protocol = cutting.cut(self.protocol, self.splits, sizes, self.holdout)
        offsets = cutting.offsets(self.splits)
        splits = {}
        for split, positions in chosen.items():
            name = self.splits[split]
            parts = [units[name][k] for k in positions]
            ids = [offsets[name] + part[0] for part in parts]
            limit = None if split in self._drawn() else self.limit.get(split)
            keep = cutting.subset(ids, limit, [len(part) for part in parts])
            indices = sorted(i for k in keep for i in parts[k])
            splits[split] = self.select(found.splits[name], indices, [offsets[name] + i for i in indices])
        if self.unit is not None:
            protocol += f"; what is cut are groups of rows with the same {self.unit}"
        if self.shots is not None:
            protocol += f"; {self.shots} training rows per class drawn by the seed of the run"
            splits |= self._few(splits["train"], seed)
        return splits, protocol

    def _units(self, rows: Dataset) -> list[list[int]]:
        """Positions of rows that stay together: each alone without `unit`."""
        if self.unit is None:
            return [[i] for i in range(len(rows))]
        column, _, key = self.unit.partition(".")
        return cutting.together([borrowed.plain(v[key] if key else v) for v in rows[column]])

    def public(self, data: DataConfig) -> Public:
        """The public splits, or generated ones where `data.mode` allows it. Raises MissingData."""
        if data.mode != "standin":
            try:
                return public(self, data)
            except MissingData as missing:
                if data.mode == "real":
                    raise
                standin_warning(self, missing)
        from tasks import standin

        return standin.generate(self)

    def select(self, rows: Dataset, indices: list[int], ids: list[int]) -> Dataset:
        """The rows at `indices` with the columns that the task reads and `ids` as `row_id`."""
        import numpy as np

        missing = [c for c in self.columns() if c not in rows.column_names]
        if missing:
            raise ValueError(f"{self.path}/{self.name}: no column {missing[0]!r}; there are {rows.column_names}")
        rows = rows.select_columns(self.columns())
        whole = np.full(len(rows), -1, dtype=np.int64)
        whole[indices] = ids
        return rows.add_column("row_id", whole).select(indices)  # type: ignore[arg-type, call-arg]

    def _drawn(self) -> tuple[str, ...]:
        return () if self.shots is None else ("train", "val") if self.protocol == "fewshot" else ("train",)

    def _few(self, rows: Dataset, seed: int) -> dict[str, Dataset]:
        classes = rows[self.target()][:] if self.target() else [0] * len(rows)
        drawn = cutting.draw(classes, self.shots or 0, seed)
        few = {split: rows.select(part) for split, part in zip(self._drawn(), drawn, strict=False)}
        return {s: part.select(cutting.subset(part["row_id"][:], self.limit.get(s))) for s, part in few.items()}

    def _check(self, splits: dict[str, Dataset]) -> None:
        ids = {s: set(rows["row_id"]) for s, rows in splits.items()}
        for split, rows in splits.items():
            if len(ids[split]) != len(rows) or not ids[split]:
                raise ValueError(f"{self.path}/{self.name}: {split} is empty or has rows twice ({len(rows)} rows)")
        shared = {pair for pair in cutting.PAIRS if ids[pair[0]] & ids[pair[1]]}
        if shared - ({("val", "test")} if self.protocol == "devset" else set()):
            raise ValueError(f"{self.path}/{self.name}: {shared} share rows under the protocol {self.protocol!r}")

    def _source(self, found: Public, splits: dict[str, Dataset], protocol: str) -> dict[str, Any]:
        limit, package = {s: n for s, n in self.limit.items() if n is not None}, found.source.get("package", {})
        return found.source | {
            "path": self.path,
            "name": self.name,
            "licence": "generated" if found.source["standin"] else package.get("licence", self.licence),
            "version": self.version,
            "suite": self.suite,
            "group": self.group,
            "protocol": protocol,
            "limit": f"{limit}: the rows first in the order of {cutting.RULE}" if limit else None,
            "overlaps": self.overlaps,
            "rows": {s: len(rows) for s, rows in splits.items()},
            "fingerprints": {s: fingerprint(rows, f"{self.path}/{self.name}: {s}") for s, rows in splits.items()},
        }


def choose(key: str, value: str, options: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    options = list(options)
    if value not in options:
        raise ValueError(f"{key}: {value!r} does not exist; the options are {', '.join(options)}")


def register(cls: T) -> T:
    """Make this dataclass the closed schema that the files of conf/task start from."""
    ConfigStore.instance().store(group="schema/task", name=cls.kind, node=cls)
    return cls
