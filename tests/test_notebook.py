"""The notebooks run from top to bottom: on synthetic records, and on published results where they are at hand."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.test_analysis import synthetic, write_grid
from tests.test_imports import OSU, PEFT, needs_osu, needs_peft
from tests.test_report import save_predictions

jupytext = pytest.importorskip("jupytext", reason="needs the notebook extra: pip install -e '.[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="needs the notebook extra: pip install -e '.[notebook]'")
NOTEBOOKS = Path(__file__).parent.parent / "analysis" / "notebooks"


def executed(name, folder, monkeypatch):
    """What the cells of a notebook put out: their texts, and how many pictures."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    assert notebook.metadata.kernelspec.name == "python3"
    # a cell takes seconds of a core; the limit is for one that hangs, on a machine that is busy with others
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return "\n".join(texts), sum("image/png" in o.get("data", {}) for o in outputs)


def test_first_look(tmp_path, monkeypatch):
    results = write_grid(tmp_path / "results", seeds=2)
    synthetic("vera", status="failed", score=None, reason="out of luck").save(results)
    monkeypatch.setenv("PARETUNE_RESULTS", str(results))
    text, pictures = executed("first_look", tmp_path, monkeypatch)
    assert pictures == 2, "one front per task"
    assert "out of luck" in text


@needs_peft
def test_peft_results(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_PEFT_RESULTS", str(PEFT))
    text, pictures = executed("peft_metamathqa", tmp_path, monkeypatch)
    assert pictures == 1 and "62 experiments of 37 families" in text
    assert "on the front of the numbers: 11; in more than 95 % of the draws: 5" in text


@needs_osu
def test_vtab_results(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_VTAB_RESULTS", str(OSU))
    text, pictures = executed("vtab_tuning", tmp_path, monkeypatch)
    assert pictures == 3 and "the winner changes on 7 of 19 data sets" in text
    assert "mean 1.05, median 0.29, maximum 27.22 points" in text


def test_fair_comparison(tmp_path, monkeypatch):
    results = compared(tmp_path / "results", {"lora": 0.9, "dora": 0.6})
    monkeypatch.setenv("PARETUNE_RESULTS", str(results))
    text, pictures = executed("fair_comparison", tmp_path, monkeypatch)
    assert pictures == 1 and "UNEQUAL budgets" in text, "lora had two settings, dora one"
    assert (
        "rte: lora is better by 0.3" in text and "2 tasks: no p below 0.5 is possible: this test cannot decide" in text
    )


def test_budget(tmp_path, monkeypatch):
    results = compared(tmp_path / "results", {"lora": 0.9, "dora": 0.6, "ia3": 0.7, "full": 0.95, "bitfit": 0.9})
    monkeypatch.setenv("PARETUNE_RESULTS", str(results))
    text, pictures = executed("budget", tmp_path, monkeypatch)
    assert "4 of 5 methods fit on rte" in text and "over budget: full" in text and pictures == 2
    assert "bitfit, which trains the fewest parameters" in text


def test_intruders(tmp_path, monkeypatch):
    from bench.config import compose
    from bench.run import run

    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PARETUNE_RESULTS", str(tmp_path / "results"))
    tiny = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:16,val:8,test:8}", "wandb=off"]
    fast = ["train.steps=3", "train.batch_size=8", "task.max_length=64", f"results={tmp_path / 'results'}"]
    for method, lr in (("lora", 0.5), ("full_ft", 0.001), ("bitfit", 0.01)):
        record = run(compose([*tiny, *fast, f"method={method}", f"train.lr={lr}", "spectra=true"]))
        assert record.status == "ok", record.reason
    text, pictures = executed("intruders", tmp_path, monkeypatch)
    assert "3 runs with spectra" in text and "the lowest |cosine| of a leading vector" in text and pictures == 5


def compared(folder, shares):
    """Runs of four seeds on two tasks with stored predictions; lora also with a second setting that val does not choose."""
    random = np.random.default_rng(0)
    for method, task, seed in itertools.product(shares, ("rte", "stsb"), range(4)):
        right = random.random(400) < shares[method]
        record = synthetic(method, task, seed, score=float(right.mean()))
        record.metrics = {"val/accuracy": record.score}
        save_predictions(record, folder, right, 0)
        if method == "lora":
            synthetic(method, task, seed, lr=9.0, metrics={"val/accuracy": 0.1}, score=0.1).save(folder)
    return folder


def test_every_notebook_is_run():
    own = Path(__file__).read_text()
    missing = [p.stem for p in NOTEBOOKS.glob("*.py") if f'"{p.stem}"' not in own]
    assert not missing, "give each notebook a test here that executes it"
