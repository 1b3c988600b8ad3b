"""The front as a table, and the forms in which the commands write."""

import io

import numpy as np
import pandas as pd
import pytest

from analysis.front_table import front_table
from tests.test_analysis import METHODS, command, frame, synthetic, write_grid


def of(costs_and_scores, **more):
    runs = [(m, s, c, v + s / 1000) for m, (c, v) in costs_and_scores.items() for s in range(3)]
    return frame(*(synthetic(m, seed=s, trained_params=c, score=v, **more) for m, s, c, v in runs))


def test_chance_epsilon_and_volume():
    table = front_table(of({"a": (10, 0.5), "b": (20, 0.6), "c": (30, 0.55), "d": (40, 0.605)}), ["trained_params"])
    table = table.set_index("method")
    assert table["front"].tolist() == [True, True, False, True] and (table["redrawn"] == "seeds").all()
    assert table["chance"]["a"] == table["chance"]["b"] == 1.0 and table["chance"]["c"] == 0
    assert table["epsilon_front"].tolist() == [True, True, False, False], "d is only half a point better than b"
    assert table["volume"]["c"] == 0 and (table["volume"][["a", "b", "d"]] > 0).all()
    (whole,) = table.attrs["hypervolume"].values()
    x, y = np.array([0, 10, 30]) / 30, np.array([0.0, 0.1, 0.105]) / 0.105
    assert whole == pytest.approx(np.sum(np.diff([*x, 1.1]) * (y + 0.1)))


def test_an_error_is_minimised_and_two_costs_are_three_objectives():
    runs = of({"a": (10, 0.5), "b": (20, 0.6)})
    low = front_table(runs, ["trained_params"], lower=True).set_index("method")
    assert low["front"].to_dict() == {"a": True, "b": False} and low["score"]["b"] == pytest.approx(0.601)
    runs["time_step"] = runs["method"].map({"a": 2.0, "b": 1.0})
    runs.loc[runs["method"] == "b", "score"] -= 0.5
    assert front_table(runs, ["trained_params", "time_step"])["front"].all(), "b is faster"
    with pytest.raises(ValueError, match="one or two columns"):
        front_table(runs, ["trained_params", "time_step", "memory_peak"])
    with pytest.raises(ValueError, match="no column 'speed'"):
        front_table(runs, ["speed"])


def test_one_seed_says_that_nothing_is_known():
    table = front_table(frame(synthetic(), synthetic("dora")), ["trained_params"])
    assert table["chance"].isna().all() and (table["redrawn"] == "nothing (one seed)").all()


def test_the_command_in_every_form(tmp_path, capsys):
    results = write_grid(tmp_path / "results")
    for more in ((), ("--all",), ("--cost", "memory_peak,trained_params", "--task", "rte")):
        assert command("pareto", results, "--format", "csv", *more) == 0
        table = pd.read_csv(io.StringIO(capsys.readouterr().out))
        assert table["front"].all() != ("--all" in more) and set(table["task"]) <= {"rte", "stsb"}
    assert set(table["task"]) == {"rte"}
    assert command("pareto", results) == 0
    text = capsys.readouterr().out
    assert "on the front" in text and "hypervolume" in text and "linear_probe" in text
    assert command("pareto", results, "--format", "latex", "-o", tmp_path / "t.tex") == 0
    written = (tmp_path / "t.tex").read_text()
    assert r"linear\_probe" in written and r"\toprule" in written and r"100\%" in written
    assert command("pareto", results, "--score", "metrics_test/f1", "--format", "markdown") == 0
    assert "| metrics_test/f1 |" in capsys.readouterr().out.replace("\n", "")
    assert command("table", results, "--format", "markdown", "--task", "rte", "-o", tmp_path / "t.md") == 0
    assert (tmp_path / "t.md").read_text().count("\n") == 2 + len(METHODS)
    capsys.readouterr()
    assert command("pareto", results, "--score", "nope") == 2 and "no column 'nope'" in capsys.readouterr().err


def test_compare_writes_tables_for_a_paper(tmp_path, capsys):
    from tests.test_report import rich

    results = rich(tmp_path / "results")
    assert command("compare", results, "--methods", "lora,ia3,dora", "--format", "csv") == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert len(table) == 3 * 2 and set(table["other"]) == {"ia3", "dora"} and (table["method"] == "lora").all()
    assert (table.loc[table["other"] == "ia3", "p_holm"] < 0.01).all()
    assert command("compare", results, "--methods", "lora,ia3", "--format", "latex") == 0
    assert r"first better \\" in capsys.readouterr().out
    assert command("compare", results, "--methods", "lora,full", "--format", "markdown") == 2
    assert "differ in software" in capsys.readouterr().err
