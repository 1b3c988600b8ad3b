"""Configurations of older records, completed: a key that came later has its default, which is how they were run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


def complete(configs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The configurations of records, each with the keys that others of them have, at the defaults of `bench/config.py`.

    Keys of a method or a task are those of others of its class. What is required, or known to no class, stays missing.
    """
    found = [{key: dict(v) if isinstance(v, dict) else v for key, v in config.items()} for config in configs]
    _fill(found, "", "")
    for name in ("model", "train"):
        _fill([c[name] for c in found if isinstance(c.get(name), dict)], name, "")
    for name in ("method", "task"):
        classes: dict[str, list[dict[str, Any]]] = {}
        for c in found:
            if isinstance(c.get(name), dict) and isinstance(c.get("classes"), dict):
                classes.setdefault(str(c["classes"].get(name)), []).append(c[name])
        for kind, parts in classes.items():
            _fill(parts, name, kind)
    return found


def _fill(parts: list[dict[str, Any]], name: str, kind: str) -> None:
    """Give each of `parts` what others have; the dataclass is imported only where something is missing."""
    keys = dict.fromkeys(key for part in parts for key in part)
    if all(len(part) == len(keys) for part in parts):
        return
    defaults = _defaults(_schema(name, kind))
    for part in parts:
        part |= {key: defaults[key] for key in keys if key not in part and key in defaults}


def _defaults(schema: Any) -> dict[str, Any]:
    fields = dataclasses.fields(schema) if schema is not None else ()
    plain = (str, int, float, bool, type(None))
    return {f.name: f.default for f in fields if isinstance(f.default, plain) and f.default != "???"}


def _schema(name: str, kind: str) -> Any:
    """The dataclass of a part of the configuration, of a method or a task by its kind; None where there is none any more."""
    from hydra.core.config_store import ConfigLoadError

    from bench.config import Config, ModelConfig, TrainConfig, task_class

    if name == "method":
        from methods import METHODS

        return METHODS.get(kind)
    try:
        return task_class(kind) if name == "task" else {"": Config, "model": ModelConfig, "train": TrainConfig}[name]
    except ConfigLoadError:
        return None
