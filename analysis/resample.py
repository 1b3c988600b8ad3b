"""Metrics of resampled test sets: each metric is a function of sums over rows, so that a resample is one matrix product.

`features` gives every row F numbers; `value` turns their sums into the metric. With counts W (draws, rows) of how often a
row was drawn, `value(W @ features)` is the metric of all draws. Spearman's ranks are those of the whole test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
CHUNK = 4_000_000  # counts in memory at once
BINARY = ("accuracy", "exact_match", "exact_match_flexible", "accuracy_norm")
CORRELATIONS = ("pearson", "spearman", "pearson_spearman")
METRICS = (*BINARY, "answered", "answer_logprob", "answer_nll", "f1", "matthews", *CORRELATIONS)


@dataclass
class Sums:
    """A metric over the rows of one test set: `features` (rows, F), and `value` from (..., F) sums to (...)."""

    features: Array
    value: Callable[[Array], Array]


def sums(metric: str, predictions: pd.DataFrame | Mapping[str, Any], classes: int = 0) -> Sums:
    """The metric of stored predictions, a table or its columns. `classes`: their number, where the rows do not show all.

    Raises ValueError for a metric that is no function of label, prediction and score.
    """
    label, prediction = np.asarray(predictions["label"]), np.asarray(predictions["prediction"])
    if metric in (*BINARY, "answered", "answer_logprob", "answer_nll"):
        return _mean(_per_row(metric, predictions))
    if metric in ("f1", "matthews"):
        number = max(classes, 2, int(max(label.max(), prediction.max())) + 1)
        return _confusion(metric, label.astype(int), prediction.astype(int), number)
    if metric in CORRELATIONS:
        return _correlation(metric, label.astype(float), prediction.astype(float))
    raise ValueError(f"metric {metric!r} cannot be computed from stored predictions; possible: {', '.join(METRICS)}")


def _per_row(metric: str, predictions: pd.DataFrame | Mapping[str, Any]) -> Array:
    column = {"exact_match_flexible": "prediction_flexible", "accuracy_norm": "prediction_norm"}.get(
        metric, "prediction"
    )
    if metric == "answer_logprob":
        return np.asarray(predictions["score"], float)
    if metric == "answer_nll":
        return np.asarray(predictions["nll"], float)
    given, label = np.asarray(predictions[column]), np.asarray(predictions["label"])
    answered = given != "" if metric in ("answered", "exact_match", "exact_match_flexible") else True
    right = given == label if metric != "answered" else True
    return np.logical_and(answered, right).astype(float) * np.ones(len(label))


def _mean(values: Array) -> Sums:
    return Sums(np.column_stack([np.ones(len(values)), values]), lambda s: s[..., 1] / s[..., 0])


def _confusion(metric: str, label: np.ndarray, prediction: np.ndarray, classes: int) -> Sums:
    cells = np.eye(classes * classes)[label * classes + prediction]

    def value(total: Array) -> Array:
        table = total.reshape(*total.shape[:-1], classes, classes)  # [label, prediction]
        return _f1(table) if metric == "f1" else _matthews(table)

    return Sums(cells, value)


def _f1(table: Array) -> Array:
    """Of class 1 for two classes, else the mean over classes; 0 where a class is neither present nor predicted."""
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    both = table.sum(-1) + table.sum(-2)
    each = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return each[..., 1] if table.shape[-1] == 2 else each.mean(-1)


def _matthews(table: Array) -> Array:
    """Gorodkin 2004 for any number of classes; 0 where either side is constant."""
    true, given, n = table.sum(-1), table.sum(-2), table.sum((-2, -1))
    covariance = n * np.trace(table, axis1=-2, axis2=-1) - (true * given).sum(-1)
    spread = (n**2 - (true**2).sum(-1)) * (n**2 - (given**2).sum(-1))
    return np.divide(covariance, np.sqrt(spread.clip(0)), out=np.zeros_like(covariance), where=spread > 1e-9)


def _correlation(metric: str, label: Array, prediction: Array) -> Sums:
    from scipy.stats import rankdata

    plain, ranked = (label, prediction), (rankdata(label), rankdata(prediction))
    pairs = {"pearson": [plain], "spearman": [ranked], "pearson_spearman": [plain, ranked]}[metric]
    standard = [[(side - side.mean()) / (side.std() or 1.0) for side in pair] for pair in pairs]
    columns = [np.column_stack([np.ones(len(x)), x, y, x * x, y * y, x * y]) for x, y in standard]

    def value(total: Array) -> Array:
        parts = total.reshape(*total.shape[:-1], len(pairs), 6)
        return _pearson(parts).mean(-1)

    return Sums(np.hstack(columns), value)


def _pearson(s: Array) -> Array:
    n, x, y, xx, yy, xy = np.moveaxis(s, -1, 0)
    spread = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
    covariance = xy / n - x * y / n**2
    return np.divide(covariance, np.sqrt(spread.clip(0)), out=np.zeros_like(covariance), where=spread > 1e-12)


def bootstrap(parts: list[Sums], draws: int, rng: np.random.Generator) -> Array:
    """(draws, parts) metrics of the same resampled rows for every part (methods and seeds share the drawn row ids)."""
    n = len(parts[0].features)
    out = [np.empty((0, len(parts)))]
    for size in _chunks(draws, n):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
        out.append(np.column_stack([part.value(counts @ part.features) for part in parts]))
    return np.concatenate(out)


def swapped(a: list[Sums], b: list[Sums], draws: int, rng: np.random.Generator) -> Array:
    """(draws,) differences of the mean metric after swapping `a` and `b` on random rows, for all seeds on the same rows."""
    n = len(a[0].features)
    out = [np.empty(0)]
    for size in _chunks(draws, n):
        keep = (rng.random((size, n)) < 0.5).astype(float)
        total = np.zeros(size)
        for x, y in zip(a, b, strict=True):
            gap = keep @ (x.features - y.features)
            total += x.value(y.features.sum(0) + gap) - y.value(x.features.sum(0) - gap)
        out.append(total / len(a))
    return np.concatenate(out)


def _chunks(draws: int, rows: int) -> list[int]:
    size = max(1, CHUNK // rows)
    return [min(size, draws - start) for start in range(0, draws, size)]
