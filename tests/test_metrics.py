"""Metrics equal scikit-learn's and scipy's, and have a defined value where those have none."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as reference

from tasks.metrics import metric, scores, token_f1


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_classes(labels, seed):
    rng = np.random.default_rng(seed)
    gold, guess = (rng.integers(0, labels, 60).tolist() for _ in range(2))
    found = scores(["accuracy", "f1", "matthews"], guess, gold, labels)
    average = "binary" if labels == 2 else "macro"
    assert found["accuracy"] == pytest.approx(np.mean(np.equal(gold, guess)))
    assert found["f1"] == pytest.approx(reference.f1_score(gold, guess, average=average))
    assert found["matthews"] == pytest.approx(reference.matthews_corrcoef(gold, guess))


@pytest.mark.parametrize("seed", range(3))
def test_values(seed):
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 6, 50).astype(float).tolist()  # with ties
    guess = (np.array(gold) + rng.normal(0, 2, 50)).tolist()
    found = scores(["pearson", "spearman"], guess, gold, 1)
    assert found["pearson"] == pytest.approx(np.corrcoef(gold, guess)[0, 1])
    ranks = [scipy.stats.rankdata(v) for v in (gold, guess)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_constant_predictions_are_zero_with_a_note(caplog):
    assert scores(["pearson", "spearman"], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0], 1) == {"pearson": 0.0, "spearman": 0.0}
    assert scores(["matthews", "f1"], [0, 0, 0], [0, 1, 1]) == {"matthews": 0.0, "f1": 0.0}
    assert "are equal" in caplog.text


def test_one_class_only():
    found = scores(["accuracy", "f1", "matthews"], [1, 1], [1, 1])
    assert found == {"accuracy": 1.0, "f1": 1.0, "matthews": 0.0}


def test_a_class_without_rows_counts_in_macro_f1():
    assert scores(["f1"], [0, 1], [0, 1], 3)["f1"] == pytest.approx(2 / 3)


def test_exact_match():
    assert scores(["exact_match"], ["1", "", "3"], ["1", "2", "4"])["exact_match"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="1 of 2 rows"):
        scores(["pearson"], [bad, 1.0], [0.0, 1.0], 1)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="0 predictions"):
        scores(["accuracy"], [], [])


def test_it_is_a_metric_of_evaluate():
    import evaluate

    accuracy = metric("accuracy")
    assert isinstance(accuracy, evaluate.Metric)
    accuracy.add_batch(predictions=[1, 0], references=[1, 1])
    assert accuracy.compute() == {"accuracy": 0.5}


@pytest.mark.parametrize("seed", range(3))
def test_questions_with_options_as_rows(seed):
    rng = np.random.default_rng(seed)
    gold, guess = (rng.integers(0, 2, 60) for _ in range(2))
    questions = [f"q{i}" for i in rng.integers(0, 15, 60)]
    guess[rng.random(60) < 0.7] = 0
    parts = [np.array(questions) == q for q in set(questions)]
    found = scores(["exact_question", "f1_question"], guess.tolist(), gold.tolist(), questions=questions)
    assert found["exact_question"] == pytest.approx(np.mean([(gold[p] == guess[p]).all() for p in parts]))
    each = [reference.f1_score(gold[p], guess[p], zero_division=0) for p in parts]
    assert found["f1_question"] == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [("the Cat.", "cat", 1.0), ("a big cat", "cat", 2 / 3), ("cat cat", "cat", 2 / 3), ("dog", "cat", 0.0), ("", "cat", 0.0), ("the", "a", 1.0)],
)  # fmt: skip
def test_f1_of_words(ours, theirs, expected):
    assert token_f1(ours, theirs) == pytest.approx(expected)


def test_evaluate_loads_the_module_without_a_network(tmp_path):
    """In a process of its own, with an empty cache and the hub's client offline."""
    code = (
        "import evaluate\n"
        "f1 = evaluate.load('tasks/evaluate_metric.py', 'f1')\n"
        "f1.add_batch(predictions=[0, 2], references=[0, 1])\n"
        "print(f1.compute(labels=3)['f1'])\n"
        "exact = evaluate.load('tasks/evaluate_metric.py', 'exact_question')\n"
        "print(exact.compute(predictions=[1, 0], references=[1, 1], questions=['a', 'b'])['exact_question'])\n"
        "evaluate.load('tasks/evaluate_metric.py', 'nothing')\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(1 / 3), "0.5"], done.stderr
    assert "there is no metric 'nothing'; the metrics are accuracy, f1" in done.stderr
