"""`python -m tasks list` and `check`: published sizes, and what is said about a mirror that differs from them."""

import pytest
from datasets import Dataset

import tasks
from tasks import mirror
from tasks.__main__ import main

MAY_LACK = {"asdiv", "mawps"}  # only packages hold them as they are cut here, and the package table has their counts


def test_every_task_states_its_sizes():
    own = {name: said for name, said in tasks.stated().items() if "path" in said}  # the others take them from these
    assert {name for name, said in own.items() if not said.get("sizes")} <= MAY_LACK
    for name in set(own) - MAY_LACK:
        read = own[name].get("splits", {}).values()
        assert set(own[name]["sizes"]) >= set(read), name


def write(root, rows=None, column="label", classes=2, splits=("train", "validation")):
    """RTE as it would come from the hub, with changes."""
    rows = {"train": 2490, "validation": 277} | (rows or {})
    data = {}
    for split in splits:
        labels = [i % classes for i in range(rows[split])]
        texts = [str(i) for i in range(rows[split])]
        data[split] = Dataset.from_dict({"sentence1": texts, "sentence2": texts, column: labels})
    mirror.write(root, "nyu-mll/glue", "rte", data, {"kind": "hub"})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, None),
        ({"rows": {"train": 2480}}, "2,480 rows in train, published are 2,490"),
        ({"column": "labels"}, "no column label in train, only"),
        ({"classes": 3}, "labels in train outside the 2 classes 0 to 1: [2]"),
        ({"classes": 1}, "classes without a row in train: [1]"),
        ({"splits": ("train",)}, "no split 'validation', only train"),
    ],
)
def test_check_names_what_differs(tmp_path, capsys, changes, said):
    write(tmp_path, **changes)
    assert main(["check", "--root", str(tmp_path)]) == (said is not None)
    printed = capsys.readouterr().out
    assert said is None or f": {said}" in printed
    assert printed.splitlines()[-1] == f"1 data sets in {tmp_path}, {int(said is not None)} wrong"


def test_list_shows_the_rows_as_the_protocol_cuts_them(capsys, monkeypatch):
    monkeypatch.setattr(tasks, "names", lambda: ["rte", "vtab_resisc45"])
    assert main(["list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["task", "kind", "hub", "id"] and "train / val / test" in head
    listed = {line.split()[0]: line for line in lines}
    assert set(listed) == set(tasks.names())
    assert "2,490 / 139 / 138" in listed["rte"] and "leakfree" in listed["rte"]
    assert "800 / 200 / 6,300" in listed["vtab_resisc45"] and "vtab/specialised" in listed["vtab_resisc45"]
