"""Training rows from another data set, rows that are scored beside test, and what may never meet."""

import pandas as pd
import pytest

from bench.evaluate import evaluate
from bench.run import run
from tasks import DataConfig, MissingData, compose_task, names
from tasks.borrowed import data_name, plain
from tests.test_run import config

STANDIN = DataConfig("standin")


def test_rows_made_from_rows_of_val_are_left_out():
    task = compose_task("gsm8k_metamath")
    rows = task.load(STANDIN)
    origin = [*rows.splits["val"]["question"], *compose_task("gsm8k").load(STANDIN).splits["train"]["question"]]
    held = {plain(q) for q in rows.splits["val"]["question"]}
    left = [i for i in range(2000) if plain(origin[i % len(origin)]) not in held]
    ids = list(rows.splits["train"]["row_id"])
    ids = [i - min(ids) + left[0] for i in ids]
    assert ids == left and 0 < len(left) < 2000
    assert rows.source["other"]["train"]["left_out"] == f"{2000 - len(left)} of 2000 rows made from rows of val or test"
    assert rows.splits["train"].column_names == ["query", "response", "row_id"]
    assert rows.splits["val"].column_names == ["question", "answer", "row_id"]


def test_a_limit_is_of_what_is_left():
    rows = compose_task("gsm8k_metamath40k", ["task.limit.train=100"]).load(STANDIN)
    assert rows.source["rows"]["train"] == 100
    assert compose_task("gsm8k_metamath40k").limit["train"] == 40000


def test_without_any_row_made_from_val_nothing_is_shown(monkeypatch):
    from tasks import borrowed

    monkeypatch.setattr(borrowed, "plain", lambda text: object())
    with pytest.raises(ValueError, match="it cannot be shown which"):
        compose_task("gsm8k_metamath").load(STANDIN)


def test_answers_of_metamath_are_read():
    task = compose_task("gsm8k_metamath")
    assert task.extract("so 5.\n#### 5\nThe answer is: 5") == ("5", "5")
    assert task.extract("The answer is: 1,080") == ("1080", "1080")


def test_training_and_scoring_on_other_rows(tmp_path):
    small = [f"task.other.{t}.{v}" for t in ("svamp", "math") for v in ("limit={test: 5}", "max_new_tokens=3")]
    one = run(
        config(tmp_path, "model=random_llama", "task=gsm8k_transfer", "method=lora", "task.max_new_tokens=3", *small)
    )
    assert one.status == "ok", one.traceback
    assert one.data["rows"] | {"svamp": 5, "math": 5} == one.data["rows"]
    assert one.score == one.metrics["test/exact_match"]
    assert {"svamp/exact_match", "math/exact_match_flexible", "math/answer_nll"} <= set(one.metrics)
    table = pd.read_parquet(tmp_path / one.id / "predictions.parquet")
    assert table["split"].value_counts()["svamp"] == 5 and table["row_id"].is_unique
    assert evaluate(tmp_path / one.id)["changed"] == 0


def test_other_training_rows_are_trained_on(tmp_path):
    one = run(config(tmp_path, "model=random_llama", "task=gsm8k_metamath", "method=lora", "task.max_new_tokens=3"))
    assert one.status == "ok", one.traceback
    assert one.data["rows"]["train"] == 64 and one.data["other"]["train"]["path"] == "meta-math/MetaMathQA"


def test_real_rows_are_never_joined_by_generated_ones(tmp_path, monkeypatch):
    from tests.test_data import write_mirror

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    write_mirror(tmp_path / "data")
    task = compose_task("rte")
    task.other = {"twice": compose_task("cb")}
    with pytest.raises(MissingData, match="super_glue"):
        task.load(DataConfig("auto"))


def test_data_that_share_rows_are_never_trained_and_tested_on():
    for trained, tested in (("rotten_tomatoes", "sst2"), ("sst2_dev", "rotten_tomatoes"), ("rte", "rte_dev")):
        task = compose_task(tested)
        task.other = {"train": compose_task(trained)}
        with pytest.raises(ValueError, match="never train on one and test on the other"):
            task.load(STANDIN)


def test_overlaps_are_said_on_both_sides():
    tasks = [compose_task(name) for name in names() if not name.startswith(("vtab", "fgvc"))]
    said = {}
    for task in tasks:
        said.setdefault(data_name(task), set()).update(task.overlaps)
    for name, others in said.items():
        for other in others & set(said):
            assert name in said[other], f"{other} does not say that it overlaps {name}"
    assert said["cornell-movie-review-data/rotten_tomatoes/default"] == {"nyu-mll/glue/sst2", "paretune/dev_rows/sst2"}


def test_only_the_same_kind_of_task_can_be_borrowed_from():
    from tasks.classification import Classification

    with pytest.raises(ValueError, match=r"task.other.val"):
        Classification(path="x", standin="entailment", other={"val": {}})
    with pytest.raises(ValueError, match="of kind 'classification'"):
        Classification(path="x", standin="entailment", other={"train": compose_task("gsm8k")})
