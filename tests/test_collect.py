"""One file out of a folder of records, and records run again."""

import json
import os
import shutil

import pandas as pd
import pyarrow.parquet
import pytest

from bench import verify
from bench.collect import collect, records
from bench.config import compose
from bench.record import Record
from bench.run import run

TINY = [
    "model=random_bert", "task=rte", "data=standin", "wandb=off", "train.epochs=null", "train.steps=3",
    "task.limit.train=32", "task.limit.val=16", "task.limit.test=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("ia3", "vpt_deep"):
        run(compose([f"method={method}", *TINY, f"results={folder}", "threads=1"]))
    return folder


@pytest.fixture
def runs(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def test_a_collected_file_has_every_record_without_loss(runs, tmp_path):
    target = tmp_path / "results.parquet"
    assert collect(runs, target) == (2, 2, [])
    found = dict(records(target))
    assert found == {p.parent.name: Record.load(p) for p in runs.glob("*/record.json")}
    table = pd.read_parquet(target)
    ok = table[table["status"] == "ok"].iloc[0]
    assert ok["metrics_test/accuracy"] == ok["score"] == found[ok["id"]].score


def test_only_what_is_new_or_changed_is_read_again(runs, tmp_path):
    target = tmp_path / "results.parquet"
    collect(runs, target)
    assert collect(runs, target) == (2, 0, [])
    path = next(runs.glob("*/record.json"))
    record = Record.load(path)
    record.warnings = ["changed"]
    record.save(runs)
    assert collect(runs, target) == (2, 1, [])
    assert dict(records(target))[path.parent.name].warnings == ["changed"]
    shutil.rmtree(path.parent)
    assert collect(runs, target) == (1, 0, [])


def test_the_type_of_a_column_does_not_depend_on_the_rows(runs, tmp_path):
    both, one = tmp_path / "both.parquet", tmp_path / "one.parquet"
    collect(runs, both)
    skipped = next(p for p in runs.glob("*/record.json") if Record.load(p).status == "skipped")
    shutil.copytree(skipped.parent, tmp_path / "few" / skipped.parent.name)
    collect(tmp_path / "few", one)
    schemas = [{f.name: f.type for f in pyarrow.parquet.read_schema(p)} for p in (both, one)]
    assert len(schemas[1]) > 25 and all(schemas[0][name] == kind for name, kind in schemas[1].items())


@pytest.mark.parametrize("text", ("", "{", "[]", '{"schema": 99}', '{"schema": 2, "surprise": 1}', "null"))
def test_a_broken_record_is_left_out_and_named(runs, tmp_path, text):
    broken = runs / "broken" / "record.json"
    broken.parent.mkdir()
    broken.write_text(text)
    total, _, problems = collect(runs, tmp_path / "results.parquet")
    assert total == 2 and [path for path, _ in problems] == [str(broken)]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        collect(tmp_path / "none", tmp_path / "results.parquet")


def ok_run(runs):
    return next(p.parent for p in runs.glob("*/record.json") if Record.load(p).status == "ok")


def test_a_record_run_again_is_the_same_to_the_last_bit(runs):
    check = verify.verify(ok_run(runs))
    assert (check.policy, check.data, check.changed, check.problem) == ("exact", True, 0.0, "")


def test_a_changed_score_a_changed_prediction_and_other_rows_are_found(runs):
    folder = ok_run(runs)
    record = Record.load(folder)
    record.metrics["val/accuracy"] += 1e-6
    record.save(runs)
    assert "val/accuracy" in verify.verify(folder).problem
    record.metrics["val/accuracy"] -= 1e-6
    record.save(runs)
    predictions = pd.read_parquet(folder / "predictions.parquet")
    predictions.loc[0, "prediction"] = 1 - predictions.loc[0, "prediction"]
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    assert "predictions differ" in verify.verify(folder).problem
    record.data["fingerprints"]["train"] = "0" * 16
    record.save(runs)
    assert verify.verify(folder).problem == "other rows"


def test_another_machine_is_compared_with_the_stated_tolerance(runs):
    folder = ok_run(runs)
    record = Record.load(folder)
    record.environment["fingerprint"] = "another"
    record.metrics["val/accuracy"] += 0.01
    record.save(runs)
    check = verify.verify(folder)
    assert check.policy == "tolerance" and not check.problem
    assert "val/accuracy" in verify.verify(folder, tolerance=0.005).problem


def test_a_sample_is_drawn_by_its_seed_from_what_ended_well(runs):
    copies = [shutil.copytree(ok_run(runs), runs / f"copy{i}") for i in range(6)]
    assert len(copies) == 6 and len(verify.sample(runs, None, 0)) == 7
    drawn = [verify.sample(runs, 3, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 3
    assert json.loads((drawn[0][0] / "record.json").read_text())["status"] == "ok"
    assert os.path.isdir(drawn[0][0])
