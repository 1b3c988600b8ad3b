"""Metrics over scikit-learn and scipy, with a defined value in every corner case.

`evaluate_metric.py` is the `evaluate` module that computes them; it is imported on first use, as that takes seconds.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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


def exact_question(predictions: Sequence[int], references: Sequence[int], *, questions: Sequence[str]) -> float:
    """Share of the questions whose answer options, each a row, are all judged right (MultiRC's EM)."""
    wrong = {q for q, p, r in zip(questions, predictions, references, strict=True) if p != r}
    return 1 - len(wrong) / len(set(questions))


def f1_question(predictions: Sequence[int], references: Sequence[int], *, questions: Sequence[str]) -> float:
    """Mean over questions of the F1 of class 1 among their answer options (MultiRC's F1m); 0 where F1 has no value."""
    rows: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        rows.setdefault(question, []).append(i)
    each = [f1([predictions[i] for i in part], [references[i] for i in part]) for part in rows.values()]
    return sum(each) / len(each)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts after `plain_words`, as SQuAD and ReCoRD define it; 1 where both have none."""
    ours, theirs = plain_words(prediction), plain_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def plain_words(text: str) -> tuple[str, ...]:
    """The words in lower case without punctuation and articles: what SQuAD and ReCoRD compare."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return tuple(re.sub(r"\b(a|an|the)\b", " ", kept).split())


FUNCTIONS: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (accuracy, f1, matthews, pearson, spearman, exact_match, exact_question, f1_question)
}


def scores(
    names: Iterable[str], predictions: list[Any], references: list[Any], labels: int = 2, **more: Any
) -> dict[str, float]:
    """The metrics called `names`. Raises ValueError for no rows, unequal lengths or values that are not finite.

    more: `questions`, the question of each row, for `exact_question` and `f1_question`.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(references)} references")
    bad = sum(isinstance(v, float) and not -float("inf") < v < float("inf") for v in predictions + references)
    if bad:
        raise ValueError(f"{bad} of {len(references)} rows have a value that is not finite; they cannot be scored")
    options = more or {"labels": labels}
    return {n: metric(n).compute(predictions=predictions, references=references, **options)[n] for n in names}


def metric(name: str) -> Any:
    """The `evaluate.Metric` called `name`; also `evaluate.load("tasks/evaluate_metric.py", name)`."""
    from tasks.evaluate_metric import Paretune

    return Paretune(config_name=name, keep_in_memory=True)


def _constant(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> bool:
    for side, values in (("predictions", predictions), ("references", references)):
        if len(set(values)) < 2:
            log.warning("%s: all %d %s are equal; the correlation is defined as 0", name, len(values), side)
            return True
    return False
