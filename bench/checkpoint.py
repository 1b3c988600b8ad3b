"""A training that was stopped, in one safetensors file: tensors as tensors, the rest as JSON in its header. No pickle."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import distributed
from bench.model import load_trained_state, trained_state
from bench.parts import like, parted, whole
from bench.record import replacing
from bench.train import Loop, Progress


def save(path: Path, loop: Loop, extra: dict[str, Any]) -> None:
    """Write model, optimizer, schedule, progress, random states and `extra` (plain values) atomically to `path`.

    One rank writes, but each must take part: for what is shared out.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    values = _flatten(
        {
            "method": loop.method.state(loop.model),
            "model": trained_state(loop.model),
            "optimizer": loop.optimizer.state_dict(),
            "schedule": loop.schedule.state_dict() | {"lr_lambdas": [None] * len(loop.schedule.lr_lambdas)},
            "progress": {f.name: getattr(loop.progress, f.name) for f in dataclasses.fields(Progress)},
            "random": random_state(),
            "extra": extra,
        },
        tensors,
    )
    if distributed.rank():
        return
    with replacing(path) as part:
        save_file(tensors, str(part), metadata={"values": json.dumps(values)})


def load(path: Path, loop: Loop) -> dict[str, Any]:
    """Put everything that `save` wrote back into `loop` and the random generators; return `extra`."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        values = _unflatten(json.loads(file.metadata()["values"]), {k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118
    loop.method.load_state(loop.model, values["method"])
    with torch.no_grad():
        load_trained_state(loop.model, values["model"])
    loop.optimizer.load_state_dict(_shared_out(values["optimizer"], loop.optimizer))
    loop.schedule.load_state_dict(values["schedule"])
    loop.progress = Progress(**values["progress"])
    set_random_state(values["random"])
    return values["extra"]


def _shared_out(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state, in the parts that its parameters have."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        if parted(p) and i in state["state"]:
            own = state["state"][i]
            own |= {name: like(value, p) for name, value in own.items() if value.shape == p.shape}
    return state


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` and replaced by their key."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        value = whole(value.detach())
        if not distributed.rank():
            tensors[key] = value.to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {value!r} of type {type(value).__name__}")


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()  # fmt: skip
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unflatten(k, tensors): _unflatten(v, tensors) for k, v in content}
    items = [_unflatten(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
