"""Metrics as `evaluate.Metric` classes over scikit-learn and scipy, with a defined value in every corner case.

`evaluate` takes seconds to import and its own modules need the hub: the classes are made here, on first use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


def accuracy(predictions: Sequence[int], references: Sequence[int], labels: int = 2) -> float:
    """Share of equal pairs."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def f1(predictions: Sequence[int], references: Sequence[int], labels: int = 2) -> float:
    """F1 of class 1 for two classes, else the mean over all `labels` classes (macro); 0 where precision and recall are."""
    from sklearn.metrics import f1_score

    if labels == 2:
        return float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0))
    return float(f1_score(references, predictions, labels=range(labels), average="macro", zero_division=0))


def matthews(predictions: Sequence[int], references: Sequence[int], labels: int = 2) -> float:
    """Matthews correlation coefficient; 0 where either side has one class only."""
    from sklearn.metrics import matthews_corrcoef

    if _constant("matthews", predictions, references):
        return 0.0
    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Sequence[float], references: Sequence[float], labels: int = 1) -> float:
    """Pearson correlation; 0 where either side is constant."""
    from scipy.stats import pearsonr

    return 0.0 if _constant("pearson", predictions, references) else float(pearsonr(predictions, references).statistic)


def spearman(predictions: Sequence[float], references: Sequence[float], labels: int = 1) -> float:
    """Spearman rank correlation, ties by mean rank; 0 where either side is constant."""
    from scipy.stats import spearmanr

    return (
        0.0 if _constant("spearman", predictions, references) else float(spearmanr(predictions, references).statistic)
    )


def exact_match(predictions: Sequence[str], references: Sequence[str], labels: int = 0) -> float:
    """Share of equal strings; an empty prediction is never right."""
    return sum(p == r != "" for p, r in zip(predictions, references, strict=True)) / len(references)


_FUNCTIONS = {f.__name__: f for f in (accuracy, f1, matthews, pearson, spearman, exact_match)}
_TYPES = {"pearson": "float64", "spearman": "float64", "exact_match": "string"}


def scores(names: Iterable[str], predictions: list[Any], references: list[Any], labels: int = 2) -> dict[str, float]:
    """The metrics called `names`. Raises ValueError for no rows, unequal lengths or values that are not finite."""
    if not references or len(predictions) != len(references):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(references)} references")
    bad = sum(isinstance(v, float) and not -float("inf") < v < float("inf") for v in predictions + references)
    if bad:
        raise ValueError(f"{bad} of {len(references)} rows have a value that is not finite; they cannot be scored")
    return {name: metric(name, labels).compute(predictions=predictions, references=references)[name] for name in names}


def metric(name: str, labels: int = 2) -> Any:
    """The `evaluate.Metric` called `name`, for `labels` classes."""
    return _class(name)(config_name=str(labels), keep_in_memory=True)


@cache
def _class(name: str) -> type:
    import datasets
    import evaluate

    function, kind = _FUNCTIONS[name], _TYPES.get(name, "int64")

    class Metric(evaluate.Metric):
        def _info(self) -> Any:
            features = {side: datasets.Value(kind) for side in ("predictions", "references")}
            description = function.__doc__ or ""
            return evaluate.MetricInfo(
                description=description, citation="", features=datasets.Features(features), inputs_description=""
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {name: function(predictions, references, int(self.config_name))}

    Metric.__name__ = name
    return Metric


def _constant(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> bool:
    for side, values in (("predictions", predictions), ("references", references)):
        if len(set(values)) < 2:
            log.warning("%s: all %d %s are equal; the correlation is defined as 0", name, len(values), side)
            return True
    return False
