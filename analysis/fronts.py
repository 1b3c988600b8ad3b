"""Pareto fronts: what no other row beats in both cost and score, among rows that may be compared."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

COMPARABLE = (
    "source",
    "task",
    "model",
    "protocol",
    "data_revision",
    "data_standin",
    "metric",
)  # one front holds one value of each
MEASURED = {  # what else one front holds one value of, where these costs are on its axis
    "device": ("memory", "time"),
    "memory_kind": ("memory", "time"),
    "padding": ("memory", "time", "flops"),
    "cpu": ("time",),
}
WITHIN = ("protocol", "data_revision", "metric")  # facts of a task: they may differ between tasks


class Mixed(ValueError):
    """Rows that no front may hold together; the message says what differs and how to split them."""


def pareto(
    table: pd.DataFrame,
    cost: str | Sequence[str] = "trained_params",
    score: str = "score",
    *,
    by: Sequence[str] = (),
    maximise: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The table with a column `front`: True where no row is as good in every objective and better in one.

    The objectives are `cost`, one column or several (three objectives: two costs), and `score`. Costs are minimised and the
    score maximised; `maximise` names the columns to maximise instead, e.g. [] for a score that is an error. Equal rows stay
    together. A row without one of the values is in no comparison: its `front` is <NA>. `by` draws one front in each group.

    Raises Mixed for rows of different sources, tasks, models, protocols, metrics, data revisions or test data, of
    generated and real data, and, where a cost is a memory or a time, of different devices or ways of measuring, of
    different CPUs, their threads or their matrix products (time), or of packed and padded batches (FLOPs too). Different
    software only warns.
    """
    objectives = [*([cost] if isinstance(cost, str) else cost), score]
    for name in (*objectives, *by, *(maximise or ())):
        if name not in table:
            raise ValueError(f"no column {name!r}; the table has {', '.join(map(str, table.columns[:20]))}, ...")
    sign = signs(objectives, [score] if maximise is None else maximise)
    front = pd.Series(pd.NA, index=table.index, dtype="boolean")
    groups = [part for _, part in table.groupby(list(by), dropna=False)] if len(by) else [table]
    for part in groups:
        for name in objectives[:-1]:
            refuse_mixed(part, name)
        known = part[part[objectives].notna().all(axis=1)]
        front[known.index] = nondominated(known[objectives].to_numpy(float) * sign)
    return table.assign(front=front)


def signs(objectives: Sequence[str], maximise: Sequence[str]) -> np.ndarray:
    """(k,) of 1 for what is minimised and -1 for what is maximised."""
    return np.array([-1.0 if name in maximise else 1.0 for name in objectives])


def nondominated(values: np.ndarray) -> np.ndarray:
    """(..., n) bool for (..., n, k) objectives to minimise, none missing: no other row is as good in all, better in one."""
    if values.ndim == 2 and values.shape[1] == 2:
        return on_front(values[:, 0], -values[:, 1])
    a, b = values[..., :, None, :], values[..., None, :, :]  # a[..., i, j] asks whether i beats j
    beats: Any = (a <= b).all(-1) & (a < b).any(-1)
    return ~np.any(beats, axis=-2)


def on_front(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(n,) bool for (n,) costs to minimise and (n,) scores to maximise, none missing; n log n."""
    levels, level = np.unique(cost, return_inverse=True)
    best = np.full(len(levels), -np.inf)
    np.maximum.at(best, level, score)  # the best score at each cost
    cheaper = np.concatenate([[-np.inf], np.maximum.accumulate(best)[:-1]]) if len(levels) else best
    return (score == best[level]) & (score > cheaper[level])


def refuse_mixed(table: pd.DataFrame, cost: str = "", *, across: Sequence[str] = (), strict: bool = False) -> None:
    """Raise Mixed where rows may not share a front, or a test.

    across: columns over which one comparison runs, e.g. ["task"]: then protocol, metric and data must agree within each
    task, while source, model and stand-in must agree over all. Different software warns; with `strict` it is refused.
    """
    kinds = [c for c, costs in MEASURED.items() if cost.startswith(costs)]
    columns = [c for c in (*COMPARABLE, *kinds, *(("software",) if strict else ())) if c in table and c not in across]
    inner = [c for c in columns if c in WITHIN] if across else []
    differing = {c: _values(table[c]) for c in columns if c not in inner and len(_values(table[c])) > 1}
    keys = [c for c in across if c in table]
    for _, part in table.groupby(keys, dropna=False) if keys else [((), table)]:
        differing |= {c: _values(part[c]) for c in inner if len(_values(part[c])) > 1}
        if conflict := _data_conflict(part):
            differing["test data (fingerprint)"] = conflict
    if differing:
        raise Mixed(_what_differs(differing, table))
    if "software" in table and len(_values(table["software"])) > 1:
        text = f"rows of different software share a front: {' | '.join(_values(table['software']))}"
        warnings.warn(text, stacklevel=3)


def _what_differs(differing: dict[str, list[str]], table: pd.DataFrame) -> str:
    what = "; ".join(f"{name}: {', '.join(values[:4])}" for name, values in differing.items())
    usable = [c for c in differing if c in table]
    hint = f"Select one of each, or compare within groups with by={usable}." if usable else "Select one data version."
    return f"one comparison cannot hold rows that differ in {what}. {hint}"


def _values(column: pd.Series) -> list[str]:
    return sorted({str(v) for v in column if not _missing(v) and v != ""})


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value))


def _data_conflict(table: pd.DataFrame) -> list[str]:
    """Two different test splits for the same seed (a protocol may cut another split for each seed)."""
    seen: dict[Any, set[str]] = {}
    for seed, fingerprint in _fingerprints(table):
        seen.setdefault(seed, set()).add(fingerprint)
    return sorted(set().union(*(prints for prints in seen.values() if len(prints) > 1)))


def _fingerprints(table: pd.DataFrame) -> list[tuple[Any, str]]:
    if "data_fingerprints" in table:
        return [pair for pairs in table["data_fingerprints"] if isinstance(pairs, tuple) for pair in pairs]
    if "data_fingerprint" not in table:
        return []
    seeds = table["seed"] if "seed" in table else [None] * len(table)
    return [(s, f) for s, f in zip(seeds, table["data_fingerprint"], strict=True) if not _missing(f)]
