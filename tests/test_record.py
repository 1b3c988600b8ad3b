"""The record: complete, typed, atomic, and named by what decides its numbers."""

import dataclasses
import json
import math
from pathlib import Path

import jsonschema
import pytest

from bench.record import SCHEMA, STATUSES, Record, identity, json_schema, write_atomically

CONFIG = {
    "method": {"rank": 8},
    "task": {"version": 1, "sizes": {"train": 9}, "suite": None, "group": None},
    "train": {"lr": 1e-3, "checkpoint_seconds": 60.0},
    "seed": 0,
    "results": "a",
    "data": {},
}


def record(**values):
    return Record(
        **{"id": "abc", "method": "lora", "model": "tiny", "task": "rte", "seed": 0, "config": CONFIG} | values
    )


def test_round_trip(tmp_path):
    old = record(score=0.5, metrics={"test/accuracy": 0.5}, history=[{"step": 1, "train/loss": 0.7}])
    assert Record.load(old.save(tmp_path)) == old
    assert Record.load(tmp_path / "abc") == old


def test_not_finite_becomes_null(tmp_path):
    path = record(score=math.nan, metrics={"a": math.inf}).save(tmp_path)
    assert json.loads(path.read_text())["metrics"] == {"a": None}


@pytest.mark.parametrize("status", STATUSES)
def test_schema_accepts_what_is_saved(tmp_path, status):
    path = record(status=status, reason="why", memory={"peak": 5}, time={"step": None}).save(tmp_path)
    jsonschema.validate(json.loads(path.read_text()), json_schema())


@pytest.mark.parametrize("wrong", [{"status": "done"}, {"seed": "0"}, {"unknown": 1}, {"schema": 0}, {"history": {}}])
def test_schema_refuses(tmp_path, wrong):
    values = dataclasses.asdict(record()) | wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, json_schema())


def test_exported_schema_is_current():
    exported = Path(__file__).parents[1] / "bench" / "record.schema.json"
    assert json.loads(exported.read_text()) == json_schema(), "run: python -m bench.record > bench/record.schema.json"


def test_load_refuses_another_version(tmp_path):
    path = record().save(tmp_path)
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', '"schema": 99'))
    with pytest.raises(ValueError, match="99"):
        Record.load(path)


def test_load_takes_records_from_before_spectra(tmp_path):
    path = record(score=0.5).save(tmp_path)
    values = json.loads(path.read_text())
    del values["spectra"]
    path.write_text(json.dumps(values | {"schema": 1}))
    assert Record.load(path) == record(score=0.5)


def test_identity_is_of_what_decides_the_numbers():
    data = {"standin": False, "fingerprints": {"train": "1"}}
    same = identity(CONFIG, data)
    assert (
        identity(
            CONFIG | {"results": "b", "wandb": "off", "spectra": True, "data": {"root": "x"}}, data | {"path": "x"}
        )
        == same
    )
    assert identity(CONFIG | {"train": {"lr": 1e-3, "checkpoint_seconds": None}}, data) == same
    assert identity(CONFIG | {"task": {"version": 1}}, data) == same  # what is known about the data decides no number
    assert identity(CONFIG | {"task": {"version": 2}}, data) != same
    for other in (CONFIG | {"seed": 1}, CONFIG | {"method": {"rank": 4}}, CONFIG | {"train": {"lr": 2e-3}}):
        assert identity(other, data) != same
    assert identity(CONFIG, data | {"standin": True}) != same
    assert identity(CONFIG, {"standin": False, "fingerprints": {"train": "2"}}) != same


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
