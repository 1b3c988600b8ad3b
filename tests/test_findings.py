"""Means per setting and correlations over runs."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.__main__ import main
from analysis.findings import correlation, settings
from bench.config import compose
from bench.run import run

TINY = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:16,val:8,test:8}", "wandb=off"]
FAST = ["task.max_length=32", "train.steps=2", "train.lr=0.1", "spectra=true"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


def test_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    runs = pd.DataFrame({"x": rng.normal(size=40), "z": rng.normal(size=40)})
    runs["y"] = np.exp(runs["x"]) + rng.normal(size=40)
    found = correlation(runs, "x", "y")
    assert found["rho"] == pytest.approx(stats.spearmanr(runs["x"], runs["y"]).statistic) and found["n"] == 40
    assert found["low"] < found["rho"] < found["high"] < 1
    assert correlation(runs.assign(y=2 * runs["x"]), "x", "y")["low"] == pytest.approx(1)


def test_what_both_have_from_a_third_is_taken_out():
    rng = np.random.default_rng(0)
    size = rng.normal(size=200)
    runs = pd.DataFrame({"size": size, "x": size + rng.normal(size=200), "y": size + rng.normal(size=200)})
    assert correlation(runs, "x", "y")["low"] > 0.2
    partial = correlation(runs, "x", "y", "size")
    assert partial["low"] < 0 < partial["high"]
    a, b, c = (stats.spearmanr(runs[i], runs[j]).statistic for i, j in (("x", "y"), ("x", "size"), ("y", "size")))
    assert partial["rho"] == pytest.approx((a - b * c) / np.sqrt((1 - b**2) * (1 - c**2)))


def test_a_constant_has_no_correlation_and_three_runs_are_too_few():
    runs = pd.DataFrame({"x": [0.0, 0, 0, 0], "y": [1.0, 2, 3, 4]})
    found = correlation(runs, "x", "y")
    assert np.isnan([found["rho"], found["low"], found["high"]]).all()
    with pytest.raises(ValueError, match="3 runs have x and y"):
        correlation(runs[:3], "x", "y")


def test_the_interval_is_students():
    about = {
        "task": "t",
        "model": "m",
        "method": "lora",
        "settings": "a",
        "status": "ok",
        "metric": "accuracy",
        "score": 0.5,
    }
    runs = pd.DataFrame([about | {"seed": s, "spectra_intruders": i} for s, i in enumerate([1.0, 2.0, 6.0])])
    (row,) = settings(runs).to_dict("records")
    low, high = stats.t.interval(0.95, 2, loc=3, scale=stats.sem([1, 2, 6]))
    assert (row["n"], row["intruders"]) == (3, 3) and row["intruders ±"] == pytest.approx((high - low) / 2)
    assert "val" not in row and row["label"] == "lora"


def test_of_runs(tmp_path, capsys):
    for rank in (1, 2):
        for seed in (0, 1):
            overrides = ["method=lora", f"method.rank={rank}", f"seed={seed}", f"results={tmp_path}"]
            assert run(compose([*TINY, *FAST, *overrides])).status == "ok"
    assert not main(["sizes", str(tmp_path), "--sizes", "9"]) and not main(["findings", str(tmp_path)])
    said = capsys.readouterr().out
    assert "random_bert, rte (stand-in)" in said and "| at size 9 |" in said and "given the size" in said
    assert sum(line.count("method_rank=") for line in said.splitlines() if line.startswith("| lora")) == 2
