"""What lies in a folder of runs may be broken in any way: it is left out with its name and a reason, and nothing crashes."""

import copy
import json

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis.__main__ import main
from analysis.export import export
from analysis.imports import GRIDS, SELECTED
from analysis.report import payload
from analysis.text import results
from tests.test_analysis import synthetic, write_grid
from tests.test_imports import peft_file, write_peft
from tests.test_report import save_predictions

BAD = [None, float("nan"), float("inf"), "x", [1], {"a": 1}, True, -1, 10**400]


def leaves(value, at=()):
    """The way to every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [place for key, part in inner for place in [(*at, key), *leaves(part, (*at, key))]]


def spoiled(content, at, bad):
    whole = copy.deepcopy(content)
    place = whole
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = bad
    return whole


def every(content):
    """Copies in each of which one value is wrong; every fifth, so that each place and each kind comes."""
    return [spoiled(content, at, bad) for at in leaves(content) for bad in BAD][::5]


def all_forms(runs):
    """Everything that a table of runs becomes."""
    json.dumps(payload(runs, "t"), allow_nan=False)
    table = analysis.summarise(runs)
    return [results(table), *(export(table, form) for form in ("csv", "markdown", "latex"))]


@pytest.mark.filterwarnings("ignore")
def test_a_record_with_any_wrong_value_is_read_or_named(tmp_path):
    record = vars(synthetic(spectra={"matrices": 4, "intruders": 2}, forgetting={"forgetting": 1.0, "text": "t"}))
    record["history"], record["config"] = record["history"][:1], {"train": {"lr": 0.1}, "seed": 0}
    cases = every(record)
    for number, case in enumerate(cases):
        (tmp_path / f"{number}").mkdir()
        case = case if case["id"] != record["id"] else case | {"id": f"run{number}"}
        (tmp_path / f"{number}" / "record.json").write_text(json.dumps(case))
    runs = analysis.load(tmp_path)
    assert len(runs) + len(runs.attrs["problems"]) == len(cases) > 100
    assert all(reason for _, reason in runs.attrs["problems"]) and len(runs.attrs["problems"]) > 30
    assert all_forms(runs)


@pytest.mark.filterwarnings("ignore")
def test_a_peft_result_with_any_wrong_value_is_read_or_named(tmp_path):
    files = {f"r{i}": case for i, case in enumerate(every(peft_file()))}
    runs = analysis.load(write_peft(tmp_path, good=peft_file(), **files))
    assert len(runs) + len(runs.attrs["problems"]) == 1 + len(files) and len(runs.attrs["problems"]) > 3
    all_forms(runs)


def vtab_line(**changes):
    line = {"dataset": "cifar", "group": "natural", "method": "lora", "grid_size": 16, "val200_top1": 70.0}
    line |= {"hyper_parameters": '{"lr": 0.01, "wd": 0.001}', "test_top1_final_epoch": 68.0}
    return line | {"test_top1_best_epoch": 69.0, "inserted_parameters": 300} | changes


@pytest.mark.filterwarnings("ignore")
def test_a_vtab_table_with_any_wrong_cell_is_read_or_named(tmp_path):
    kinds = ("", "x", "{", "[1]", "nan", "inf", "1e400")
    lines = [vtab_line(), *(vtab_line(**{column: bad}) for column in vtab_line() for bad in kinds)]
    pd.DataFrame(lines).to_csv(tmp_path / SELECTED, index=False)
    runs = analysis.load(tmp_path)
    assert len(runs) + len(runs.attrs["problems"]) == len(lines), "a broken line takes no other with it"
    assert runs.iloc[0]["score"] == 0.68 and len(runs.attrs["problems"]) > 20
    all_forms(runs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n", b'"open', b"\x00\x00"])
def test_a_broken_table_or_result_file_is_named(tmp_path, content):
    synthetic().save(tmp_path)
    (tmp_path / SELECTED).write_bytes(content)
    (tmp_path / "result.json").write_bytes(content)
    runs = analysis.load(tmp_path)
    assert len(runs) == 1
    assert {path.rpartition("/")[2] for path, _ in runs.attrs["problems"]} == {SELECTED, "result.json"}
    (tmp_path / GRIDS).write_bytes(content)
    with pytest.raises(ValueError, match=GRIDS):
        analysis.vtab_grids(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_loops_folders_and_locked_files_are_named(tmp_path, monkeypatch):
    folder = write_grid(tmp_path / "results", seeds=1)
    count = len(analysis.load(folder))
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "inside").mkdir()
    (folder / "inside" / "record.json").symlink_to(folder / "inside" / "record.json")
    (folder / "up").symlink_to(folder)
    (folder / "loop.json").symlink_to(folder / "loop.json")
    (folder / SELECTED).mkdir()
    locked = synthetic("vera").save(folder)
    read = type(locked).read_text

    def denied(path, *options, **named):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *options, **named)

    monkeypatch.setattr(type(locked), "read_text", denied)
    runs = analysis.load(folder)
    assert len(runs) == count and "Permission denied" in str(runs.attrs["problems"])
    assert all_forms(runs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["empty", "cut", "text", "columns", "no ids", "twice", "folder", "labels"])
def test_broken_predictions_are_named_and_seeds_must_do(tmp_path, kind, capsys):
    for method, seed in ((m, s) for m in ("lora", "dora") for s in range(3)):
        record = synthetic(method, seed=seed)
        save_predictions(record, tmp_path, np.arange(40) % 3 > seed / 3, 0)
    file = tmp_path / record.id / "predictions.parquet"
    content, table = file.read_bytes(), pd.read_parquet(file)
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind in ("columns", "no ids", "twice", "labels"):
        rows = {"columns": table.drop(columns="split"), "no ids": table.assign(row_id=None)}
        rows |= {"twice": table.assign(row_id=1), "labels": table.assign(label=[[1]] * len(table))}
        rows[kind].to_parquet(file)
    else:
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"PAR1 no PAR1"}[kind])
    data = payload(analysis.load(tmp_path), "t")
    named = [path for path, _ in data["problems"]]
    assert named == ([] if kind == "folder" else [str(file)])
    assert data["matrices"][0]["pairs"][0][-1] in ("seeds", "predictions")
    assert main(["compare", str(tmp_path), "--methods", "lora,dora"]) in (0, 2)
    assert main(["recommend", str(tmp_path), "--max-memory", "16GB", "--max-params", "1%"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_an_older_schema_is_migrated_and_a_later_one_named(tmp_path):
    for number, schema in enumerate((1, 2, 3, 4, "3", None)):
        values = vars(synthetic(seed=number)) | {"schema": schema, "id": str(number)}
        if schema in (1, 2):
            values = {k: v for k, v in values.items() if k not in ("spectra", "forgetting")[schema - 1 :]}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "record.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"3 file\(s\) left out"):
        runs = analysis.load(tmp_path)
    assert sorted(runs["id"]) == ["0", "1", "2"]
    assert all("this version reads" in reason for _, reason in runs.attrs["problems"])


def test_latex_of_hard_names_has_no_bare_special_character(tmp_path):
    synthetic(r"a_b & 50% #1 {x} $y$ ~^\z").save(tmp_path)
    line = next(row for row in all_forms(analysis.load(tmp_path))[-1].splitlines() if "50" in row and "&" in row)
    assert r"a\_b \& 50\% \#1 \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{}z" in line
    assert line.replace(r"\&", "").count("&") == 8 and "%" not in line.replace(r"\%", "")
