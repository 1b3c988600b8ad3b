"""The record of one run: one typed, versioned JSON file, from which the run can be rebuilt.

`results/<id>/` holds `record.json` and, beside it, `predictions.parquet` (val and test, one row per example) and
`state.safetensors` (the trained parameters). `<id>` is the hash of what decides the numbers; see `identity`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 3
STATUSES = ("ok", "skipped", "oom", "diverged", "failed", "interrupted")
NOT_IDENTITY = (
    "results",
    "force",
    "wandb",
    "wandb_project",
    "device",
    "threads",
    "matmul",
    "data",
    "name",
    "save_state",
    "spectra",
    "spectra_every",
    "forgetting",
    "isolate",
    "lease",
    "cells_per_gpu",
    "shard",
)
PART = ".part"  # the end of a file's name that is being written

TASK_FACTS = (
    "sizes",
    "suite",
    "group",
    "overlaps",
)  # of a task's configuration: what is known about the data, deciding no number


@dataclass
class Record:
    """One run. Bytes are bytes, times seconds, FLOPs multiply-adds counted as two; null where not measured."""

    id: str
    method: str
    model: str
    task: str  # "rte (stand-in)" where the rows are generated, so that no table can mix the two
    seed: int
    config: dict[str, Any]
    schema: int = SCHEMA
    experiment: str | None = None  # the name of the grid that this run belongs to
    status: str = "ok"
    reason: str = ""  # one sentence for every status but ok
    traceback: str = ""
    data: dict[str, Any] = field(default_factory=dict)  # where the rows came from, protocol, licence, fingerprints
    model_source: dict[str, Any] = field(default_factory=dict)  # where the weights came from, licence, new parameters
    metric: str = ""  # the headline metric's name
    score: float | None = None  # the headline metric on the test split at the selected checkpoint
    metrics: dict[str, float | None] = field(default_factory=dict)  # "val/accuracy", "test/accuracy", "last_val/..."
    selected_step: int | None = None
    steps: int | None = None
    trained_params: int | None = None  # of the method, without the task head
    head_params: int | None = None
    stored_params: int | None = None  # what a checkpoint must hold: trained parameters, head and buffers
    stored_bytes: int | None = None
    total_params: int | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    time: dict[str, float | None] = field(default_factory=dict)
    flops: dict[str, int | None] = field(default_factory=dict)
    energy: dict[str, float | None] = field(default_factory=dict)
    spectra: dict[str, float | None] = field(default_factory=dict)  # `headline` of analysis/spectra_model.py
    forgetting: dict[str, Any] = field(default_factory=dict)  # numbers and their source: analysis/forgetting.py
    history: list[dict[str, float | None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> str:
        """Which cell of the grid, for people."""
        return f"{self.method} {self.model} {self.task} seed {self.seed}"

    def save(self, results: Path) -> Path:
        """Write `results/<id>/record.json` atomically; return its path. NaN and infinities become null."""
        path = Path(results) / self.id / "record.json"
        write_atomically(path, json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record file or its folder, of this schema or an earlier one. Raises ValueError for another one or unknown keys."""
        path = Path(path)
        values = json.loads((path / "record.json" if path.is_dir() else path).read_text())
        if values.get("schema") in (1, 2):  # before spectra, before forgetting
            values = {"spectra": {}, "forgetting": {}} | values | {"schema": SCHEMA}
        if values.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema version {values.get('schema')!r}; this version reads {SCHEMA}")
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown keys {sorted(unknown)}")
        return cls(**values)


def identity(config: dict[str, Any], data: dict[str, Any]) -> str:
    """The 12 hex digits that name a run: a hash of what decides its numbers (the resolved config and the rows).

    Where results go, which machine trains, how often it writes checkpoints and how it is tracked do not change the id.
    """
    kept = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    if kept.get("test") == "open":  # as before the test split could be locked
        del kept["test"]
    kept["train"] = {k: v for k, v in config["train"].items() if k != "checkpoint_seconds"}
    if kept["train"].get("offload") == "none":  # as before anything could go to the host
        del kept["train"]["offload"]
    if kept["train"].get("features") == "off":  # as before features could be kept
        del kept["train"]["features"]
    if kept["train"].get("padding") == "padded":  # as all batches were before they could be packed
        del kept["train"]["padding"]
    if kept.get("method", {}).get("bits") == 4:  # as before qlora could keep 8
        kept["method"] = {k: v for k, v in kept["method"].items() if k != "bits"}
    kept["task"] = {k: v for k, v in config["task"].items() if k not in TASK_FACTS}
    kept["data"] = {k: data.get(k) for k in ("standin", "fingerprints")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a killed process or a full disk leaves the old file or the new."""
    with replacing(path) as part:
        part.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new temporary path beside `path`, which takes its place at the end of the block; after an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}{PART}"
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


_TYPES = {"str": "string", "int": "integer", "float": "number", "None": "null", "dict": "object", "list": "array"}


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record file, read off the dataclass."""
    properties: dict[str, Any] = {}
    for f in dataclasses.fields(Record):
        kinds = [_TYPES[part.split("[")[0].strip()] for part in _alternatives(str(f.type))]
        properties[f.name] = {"type": kinds if len(kinds) > 1 else kinds[0]}
    properties["schema"] = {"const": SCHEMA}
    properties["status"] = {"enum": list(STATUSES)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Paretune record",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _alternatives(annotation: str) -> list[str]:
    """Split `int | None` at the top level only (`dict[str, float | None]` is one alternative)."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(annotation):
        depth += (c == "[") - (c == "]")
        if c == "|" and depth == 0:
            parts.append(annotation[start:i])
            start = i + 1
    return [*parts, annotation[start:]]


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
