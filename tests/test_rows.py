"""Rows are read once per process, and anew where anything that decides them has changed."""

from __future__ import annotations

import os

import pytest
from datasets import Dataset

from bench import rows
from bench.config import compose
from tasks import mirror
from tasks.classification import Classification

STANDIN = ["task=rte", "data=standin"]


@pytest.fixture(autouse=True)
def loads(monkeypatch):
    """The tasks whose rows were read, in their order."""
    monkeypatch.setattr(rows, "_kept", rows.OrderedDict())
    found, inner = [], Classification.load
    monkeypatch.setattr(Classification, "load", lambda self, *rest: found.append(self.path) or inner(self, *rest))
    return found


def given(*overrides: str):
    return rows.load(compose([*STANDIN, *overrides]))


def test_a_second_cell_reads_nothing_and_sees_the_same_rows(loads):
    one, two = given("seed=0", "method=lora"), given("seed=1", "method=bitfit")
    assert len(loads) == 1
    assert one.source == two.source and one.splits["test"][:] == two.splits["test"][:]


def test_what_a_run_changes_is_its_own():
    one = given()
    one.splits.pop("test")
    one.source["rows"]["train"] = -1
    one.source["features"] = "kept"
    two = given()
    assert "test" in two.splits and two.source["rows"]["train"] > 0 and "features" not in two.source


@pytest.mark.parametrize("other", ["task.limit.train=7", "task.holdout=9", "task=cola", "data=auto"])
def test_another_task_or_source_is_read(other, loads):
    given()
    given(other)
    assert len(loads) == 2


def test_a_seed_is_only_asked_where_it_draws_rows(loads):
    shots = "task.shots=4"
    ids = [given(shots, f"seed={seed}").splits["train"]["row_id"][:] for seed in (0, 1, 0)]
    assert len(loads) == 2 and ids[0] == ids[2] != ids[1]


def test_a_changed_file_is_read_again(tmp_path, loads):
    def write(word: str) -> None:
        splits = {}
        for split, size in (("train", 40), ("validation", 10)):
            lines = [{"sentence1": f"{word} {i}", "sentence2": "so", "label": i % 2} for i in range(size)]
            splits[split] = Dataset.from_list(lines)
        mirror.write(tmp_path, "nyu-mll/glue", "rte", splits, {})

    real = ["task=rte", "data=real", f"data.root={tmp_path}"]
    write("one")
    first = rows.load(compose(real))
    assert rows.load(compose(real)).source == first.source and len(loads) == 1
    write("two")
    second = rows.load(compose(real))
    assert len(loads) == 2 and second.splits["train"][0]["sentence1"].startswith("two")
    assert second.source["fingerprints"]["train"] != first.source["fingerprints"]["train"]
    os.utime(next(tmp_path.rglob("train-*.parquet")))
    assert rows.load(compose(real)).source["fingerprints"] == second.source["fingerprints"] and len(loads) == 3


def test_only_so_many_tasks_are_kept(monkeypatch, loads):
    monkeypatch.setattr(rows, "TASKS", 2)
    for size in (5, 6, 5, 7, 5, 6):  # 6 goes when 7 comes
        given(f"task.limit.train={size}")
    assert len(loads) == 4 and len(rows._kept) == 2
