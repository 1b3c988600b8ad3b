"""The significance matrix: its standard errors are those of the bootstrap, its level is kept, its guard says what it refuses."""

import numpy as np
import pandas as pd
import pytest

from analysis import paired
from analysis.pairs import all_pairs, influence
from analysis.resample import bootstrap, sums


def answers(right, label, text=False):
    wrong = np.where(label == "a", "b", "a") if text else 1 - label
    return pd.DataFrame({"label": label, "prediction": np.where(right, label, wrong), "score": 0.5})


def runs_of(folder, method, tables, metric="accuracy", software="torch 2"):
    """Rows of `analysis.load` with their predictions on disk, one per seed."""
    rows = []
    for seed, table in enumerate(tables):
        place = folder / f"{method}-{seed}"
        place.mkdir()
        table.assign(row_id=range(len(table)), split="test").to_parquet(place / "predictions.parquet")
        part = sums(metric, table)
        score = float(part.value(part.features.sum(0)))
        facts = {"task": "t", "model": "m", "status": "ok", "metric": metric, "settings": "s", "software": software}
        rows.append(facts | {"method": method, "seed": seed, "score": score, "path": str(place / "record.json")})
    return rows


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson_spearman"])
def test_the_influence_gives_the_variance_of_the_bootstrap(metric):
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 600) if metric != "pearson_spearman" else random.normal(size=600)
    table = answers(random.random(600) < 0.8, label)
    if metric == "pearson_spearman":
        table["prediction"] = label + random.normal(size=600)
    part = sums(metric, table)
    drawn = bootstrap([part], 3_000, random)[:, 0]
    assert np.sqrt((influence(part) ** 2).sum()) == pytest.approx(drawn.std(), rel=0.08)


def test_a_pair_is_what_compare_says(tmp_path):
    random = np.random.default_rng(1)
    label = random.integers(0, 2, 500)
    a = runs_of(tmp_path, "a", [answers(random.random(500) < 0.82, label) for _ in range(4)])
    b = runs_of(tmp_path, "b", [answers(random.random(500) < 0.78, label) for _ in range(4)])
    (row,) = all_pairs({"a": a, "b": b}).to_dict("records")
    full = paired.compare(pd.DataFrame([*a, *b]), "a", "b").iloc[0]
    assert row["difference"] == pytest.approx(full["difference"]) and row["seeds"] == 4
    assert row["p"] == pytest.approx(full["p_bootstrap"], abs=0.03) and row["evidence"] == "predictions"


def test_equal_methods_are_told_apart_in_one_of_twenty_matrices(tmp_path):
    random, false = np.random.default_rng(2), 0
    label = np.arange(300) % 2
    for k in range(60):
        place = tmp_path / str(k)
        place.mkdir()
        rows = {m: runs_of(place, m, [answers(random.random(300) < 0.7, label) for _ in range(3)]) for m in "abcd"}
        table = all_pairs(rows)
        assert len(table) == 6 and (table["p_holm"] >= table["p"]).all()
        false += bool((table["p_holm"] < 0.05).any())
    assert false <= 8, "5 % of 60 are 3; 8 has a probability below 1 %"


def test_what_cannot_be_paired_says_why(tmp_path):
    random, label = np.random.default_rng(3), np.arange(200) % 2
    tables = [answers(random.random(200) < 0.7, label) for _ in range(2)]
    other = [answers(random.random(200) < 0.7, 1 - label) for _ in range(2)]
    rows = {"a": runs_of(tmp_path, "a", tables), "new": runs_of(tmp_path, "new", tables, software="torch 3")}
    rows |= {"labels": runs_of(tmp_path, "labels", other), "bare": runs_of(tmp_path, "bare", tables)}
    rows["bare"] = [run | {"path": str(tmp_path / "nowhere" / "record.json")} for run in rows["bare"]]
    rows["single"], rows["later"] = rows["bare"][:1], [run | {"seed": 9} for run in rows["bare"]]
    found = {(r["first"], r["second"]): r for r in all_pairs(rows).to_dict("records")}
    said = {pair: row["evidence"] for pair, row in found.items()}
    assert said["a", "new"] == "software" and said["a", "labels"] == "other test rows" and said["a", "bare"] == "seeds"
    assert said["a", "single"] == "one seed" and said["a", "later"] == "no common seed"
    assert np.isnan(found["a", "new"]["p"]) and np.isnan(found["a", "single"]["p_holm"])
    assert found["a", "bare"]["p"] == 1.0, "the same scores"


def test_another_test_set_for_each_seed_is_no_mix(tmp_path):
    random = np.random.default_rng(4)
    cuts = [random.integers(0, 2, 200) for _ in range(2)]
    rows = {
        m: runs_of(tmp_path, m, [answers(random.random(200) < p, c) for c in cuts]) for m, p in (("a", 0.9), ("b", 0.5))
    }
    (row,) = all_pairs(rows).to_dict("records")
    assert row["evidence"] == "predictions" and row["se"] > 0 and row["difference"] > 0.2
