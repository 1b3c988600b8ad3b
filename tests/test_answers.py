"""compare, recommend and export: what they say, and that they say when the data cannot decide."""

import itertools

import numpy as np
import pandas as pd
import pytest

from tests.test_analysis import command, synthetic, write_grid
from tests.test_imports import PEFT, needs_peft, peft_file, write_peft
from tests.test_statistics import with_predictions


@pytest.fixture
def results(tmp_path):
    """Two tasks, three seeds: `good` beats `lora` clearly, `twin` equals it but trains less, `huge` needs more memory."""
    random = np.random.default_rng(0)
    for task in ("rte", "sst2"):
        common, gain = random.random(300) < 0.6, random.random(300) < 0.5
        for seed in range(3):
            base = common ^ (random.random(300) < 0.02)
            near = base ^ (random.random(300) < 0.02)
            good = base | gain
            for method, right, params, peak in (
                ("lora", base, 9000, 10e9), ("twin", near, 500, 9e9), ("good", good, 9000, 12e9), ("huge", good, 10, 40e9)
            ):  # fmt: skip
                memory = {"peak": peak, "weights": peak}
                with_predictions(tmp_path, right, method, seed, task=task, trained_params=params, memory=memory)
    return tmp_path


def test_compare_says_who_is_better_and_what_cannot_be_told(results, capsys):
    assert command("compare", results, "--methods", "lora,good,twin") == 0
    text = capsys.readouterr().out
    better, same = text.split("lora minus twin")
    assert better.count("second better") == 2 and "first better" not in text
    assert same.count("cannot tell (needs a difference of 0.0") == 2
    assert "2 tasks cannot give p below 0.5" in text and "mean ranks: good 1.00" in text
    assert command("compare", results, "--methods", "lora,good", "--task", "rte") == 0
    text = capsys.readouterr().out
    assert "sst2" not in text and "1 task, so no test over tasks" in text


def test_compare_without_predictions_and_with_wrong_names(tmp_path, capsys):
    write_grid(tmp_path, methods=("lora", "dora"))
    assert command("compare", tmp_path, "--methods", "lora,dora") == 0
    assert "no predictions" in capsys.readouterr().out
    for arguments, says in (
        (("--methods", "lora,x"), "no runs of x; the methods are dora, lora"), (("--methods", "lora"), "two or more different"),
        (("--methods", "lora,dora", "--task", "cola"), "they have rte, stsb"),
        (("--methods", "lora,dora", "--where", "nothing=1"), "no such column"),
    ):  # fmt: skip
        assert command("compare", tmp_path, *arguments) == 2
        assert says in capsys.readouterr().err


def test_compare_takes_the_setting_that_val_chose(tmp_path, capsys):
    right = np.arange(100) < 70
    for lr, val, share in ((1e-3, 0.5, 90), (1e-2, 0.9, 70)):
        record = synthetic("lora", score=share / 100, lr=lr, metrics={"val/accuracy": val})
        record.id = f"lora{lr}"
        path = record.save(tmp_path)
        rows = pd.DataFrame(
            {"row_id": range(100), "label": 1, "prediction": (np.arange(100) < share) * 1, "score": 1.0}
        )
        rows.assign(split="test").to_parquet(path.parent / "predictions.parquet")
    with_predictions(tmp_path, right, "dora")
    assert command("compare", tmp_path, "--methods", "lora,dora") == 0
    text = capsys.readouterr().out
    assert "chosen on val" in text and "+0.0000" in text


def test_recommend_weighs_evidence_against_cost(results, capsys):
    assert command("recommend", results, "--max-memory", "16GB", "--max-params", "1%") == 0
    text = capsys.readouterr().out
    assert text.count("good, better than each of the 2 others that fit") == 2 and "huge (memory 37.3 GiB)" in text
    assert "among the best on all 2 tasks: good" in text
    assert command("recommend", results, "--max-memory", "11GB", "--task", "rte") == 0
    assert "cannot decide between the 2 methods that fit; twin trains the fewest" in capsys.readouterr().out
    assert command("recommend", results, "--max-memory", "1GB", "--task", "rte") == 0
    assert "no method fits the budget" in capsys.readouterr().out
    assert command("recommend", results, "--max-memory", "lots") == 2
    assert "no amount: a number and one of %" in capsys.readouterr().err


def test_recommend_does_not_choose_between_two_that_cannot_be_told_apart(tmp_path, capsys):
    """Noise around one accuracy: the higher number is no choice, and the other way round neither."""
    random = np.random.default_rng(3)
    for seed, method in itertools.product(range(3), ("lora", "dora")):
        params = 9000 if method == "lora" else 500
        with_predictions(tmp_path, random.random(400) < 0.7, method, seed, trained_params=params)
    assert command("recommend", tmp_path) == 0
    text = capsys.readouterr().out
    assert "cannot decide between the 2 methods that fit; dora trains the fewest" in text and "better than" not in text


def test_recommend_says_when_one_seed_says_nothing(tmp_path, capsys):
    for method in ("lora", "dora"):
        synthetic(method, metric="matthews").save(tmp_path)
    assert command("recommend", tmp_path) == 0
    assert "the data cannot decide: one seed each and no stored predictions" in capsys.readouterr().out


def test_recommend_refuses_other_software(tmp_path, capsys):
    write_peft(tmp_path, a=peft_file(), b=peft_file("dora/x", accuracy=0.2, torch="2.9"))
    assert command("recommend", tmp_path) == 2
    assert "software: torch 2.13.0, torch 2.9" in capsys.readouterr().err
    assert command("recommend", tmp_path, "--where", "software=2.13") == 0
    assert "the only method that fits" in capsys.readouterr().out


@needs_peft
def test_recommend_on_the_peft_results(capsys):
    """One seed and no predictions: the size of the test set is the evidence, and it leaves many methods together."""
    assert command("recommend", PEFT, "--where", "software=transformers 5.13.1", "--max-params", "1%") == 0
    text = capsys.readouterr().out
    assert "cannot be told apart" in text and "rows" in text and "full-finetuning" in text.split("over budget")[1]


def test_export_formats(tmp_path, capsys):
    folder = write_grid(tmp_path / "r", tasks=("a_b",), methods=("lora", "full"))
    assert command("export", folder) == 0
    from io import StringIO

    read = pd.read_csv(StringIO(capsys.readouterr().out))
    assert len(read) == 2 and read["score_low"].notna().all()
    assert command("export", folder, "--format", "markdown") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert (
        len(lines) == 4 and len({line.count("|") for line in lines}) == 1 and sum("**" in line for line in lines) == 1
    )
    assert command("export", folder, "--format", "latex", "-o", tmp_path / "t.tex") == 0
    text = (tmp_path / "t.tex").read_text()
    assert r"a\_b" in text and r"$\pm$" in text and text.count(r"\\") == 3 and r"\textbf{" in text
