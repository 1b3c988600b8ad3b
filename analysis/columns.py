"""The measured columns of a table: their titles, units and how a number of each is written."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple


class Column(NamedTuple):
    """`unit` is the unit of the stored number: bytes, s, FLOP, J or "" for a count."""

    title: str
    unit: str


COSTS: dict[str, Column] = {
    "trained_params": Column("Trained parameters", ""),
    "stored_bytes": Column("Checkpoint size", "bytes"),
    "memory_peak": Column("Peak memory", "bytes"),
    "time_step": Column("Time per step", "s"),
    "time_train": Column("Training time", "s"),
    "flops_train_step": Column("FLOPs per step", "FLOP"),
    "flops_total_train": Column("Training FLOPs", "FLOP"),
    "stored_params": Column("Stored parameters", ""),
    "memory_weights": Column("Memory of weights", "bytes"),
    "memory_gradients": Column("Memory of gradients", "bytes"),
    "memory_optimizer": Column("Memory of optimizer state", "bytes"),
    "memory_activations": Column("Memory of activations", "bytes"),
    "memory_peak_train": Column("Peak memory in training", "bytes"),
    "memory_peak_eval": Column("Peak memory in evaluation", "bytes"),
    "time_setup": Column("Set-up time", "s"),
    "time_eval": Column("Evaluation time", "s"),
    "time_total": Column("Total time", "s"),
    "energy_gpu_joules": Column("Energy of the GPU", "J"),
    "time_generation": Column("Generation time", "s"),
    "flops_forward": Column("Forward FLOPs per batch", "FLOP"),
}
MAIN_COSTS = ("trained_params", "memory_peak", "time_step", "flops_train_step")
METRICS = "metrics_"  # prefix of every metric's column


def axis_title(name: str) -> str:
    """`Peak memory (bytes)`; an unknown column is its own title."""
    column = COSTS.get(name, Column(name.removeprefix(METRICS), ""))
    return f"{column.title} ({column.unit})" if column.unit else column.title


def is_score(name: str) -> bool:
    """Whether a column holds a metric rather than a cost."""
    return name == "score" or name.startswith(METRICS)


def checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of another project's results. Raises ValueError where a name is no text, a number no finite number, or a cell not one value."""
    for name, value in row.items():
        number = name in COSTS or is_score(name)
        if number and not (value is None or (type(value) in (int, float) and not abs(value) > sys.float_info.max)):
            raise ValueError(f"{name} is {value!r:.60}, not a number")
        if name in ("task", "model", "method") and not (isinstance(value, str) and value):
            raise ValueError(f"{name} is {value!r:.60}, not a name")
        if isinstance(value, dict | list):
            raise ValueError(f"{name} is {value!r:.60}, not one value")
    return row


def write(value: float, unit: str = "") -> str:
    """A number for people: 295k, 1.2 GiB, 34 ms, 2.1 TFLOP; an en dash where it is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "bytes":
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    if unit == "s" and abs(value) < 1:
        return f"{value * 1000:.3g} ms"
    if unit == "s":
        return f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"
    if unit:
        return _scaled(value, 1000, tuple(f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P", "E")))
    return _scaled(value, 1000, ("", "k", "M", "G")).replace(" ", "")


def _scaled(value: float, base: int, names: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    digits = f"{value:.0f}" if abs(value) >= 100 or (power == 0 and value == int(value)) else f"{value:.3g}"
    return f"{digits} {names[power]}".rstrip()
