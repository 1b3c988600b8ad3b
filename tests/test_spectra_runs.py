"""Spectra of runs and of checkpoints, from the commands down."""

import json

import pandas as pd
import pytest

import analysis
from analysis.__main__ import main
from analysis.spectra_runs import of_records
from bench.config import compose
from bench.record import Record
from bench.run import run

TINY = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:32,val:16,test:16}", "wandb=off"]
FAST = ["train.steps=4", "train.batch_size=8", "task.max_length=64", "train.lr=0.05"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


def trained(tmp_path, *overrides):
    record = run(compose([*TINY, *FAST, f"results={tmp_path / 'runs'}", *overrides]))
    assert record.status == "ok", record.reason + record.traceback
    return record


def test_in_a_run_and_afterwards_are_the_same(tmp_path):
    record = trained(tmp_path, "method=lora", "method.rank=2", "spectra=true")
    folder = tmp_path / "runs" / record.id
    table = pd.read_parquet(folder / "spectra.parquet")
    changed = table[table["changed"]]
    assert set(changed["kind"]) == {"query", "value"} and (changed["numerical_rank"] == 2).all()
    assert record.spectra["matrices"] == 12 and record.spectra["changed"] == 4
    (folder / "spectra.parquet").unlink()
    stored = Record.load(folder)
    stored.spectra = {}
    stored.save(folder.parent)
    assert "of the top 10 of 12 matrices" in of_records(tmp_path / "runs")
    again = Record.load(folder)
    assert again.spectra == pytest.approx(record.spectra) and again.score == record.score
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "spectra.parquet"), table)
    runs = analysis.load(tmp_path / "runs")
    assert runs["spectra_intruders"].item() == record.spectra["intruders"]
    assert run(compose([*TINY, *FAST, f"results={tmp_path / 'runs'}", "method=lora", "method.rank=2"])).id == record.id


@pytest.mark.parametrize("overrides", [["method=bitfit"], ["method=prefix_tuning"], ["method=linear_probe"], ["method=houlsby"], ["method=hf", "method.type=PROMPT_TUNING"]])  # fmt: skip
def test_no_weight_change(tmp_path, overrides):
    record = trained(tmp_path, *overrides, "spectra=true")
    assert record.spectra["changed"] == 0 and record.spectra["intruders"] is None
    assert "no weight change" in of_records(tmp_path / "runs")


@pytest.mark.parametrize("method", ["full_ft", "dora", "pissa", "hf"])
def test_against_the_pretrained_weights(tmp_path, method):
    """PiSSA changes the stored base before it trains: its change is yet of rank 2 r at most."""
    rank = {"full_ft": [], "hf": []}.get(method, ["method.rank=2"])
    record = trained(tmp_path, f"method={method}", *rank, "spectra=true")
    table = pd.read_parquet(tmp_path / "runs" / record.id / "spectra.parquet")
    changed = table[table["changed"]]
    assert len(changed) == (12 if method == "full_ft" else 4)
    assert changed["norm_ratio"].between(1e-4, 10).all()
    if method == "pissa":
        assert (changed["numerical_rank"] <= 4).all()


def test_command_on_two_checkpoints(tmp_path, capsys):
    import torch

    from bench.random_models import random_model

    model = random_model("bert")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out.json"
    assert (
        main(["spectra", "--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned"), "--json", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    assert "encoder.layer.1.intermediate.dense" in printed and "1 changed" in printed
    found = json.loads(out.read_text())
    assert found["headline"]["changed"] == 1 and len(found["matrices"]) == 12 and found["architecture"] == "bert"
    assert main(["spectra", "--base", "x"]) == 2 and "both --base and --tuned" in capsys.readouterr().err
    assert main(["spectra", "--base", str(tmp_path), "--tuned", str(tmp_path)]) == 2
    assert main(["spectra", str(tmp_path / "none")]) == 2


def test_a_quantised_base_is_dequantised_and_compared_with_the_pretrained_one(tmp_path):
    """Rounding to 4 bits is a change of full rank and of about a tenth of the weight, with no intruder of its own."""
    record = trained(tmp_path, "method=qlora", "method.rank=2", "spectra=true", "train.lr=1e-6")
    table = pd.read_parquet(tmp_path / "runs" / record.id / "spectra.parquet")
    assert table["changed"].all() and len(table) == 12
    assert table["norm_ratio"].between(0.05, 0.15).all() and (table["numerical_rank"] > 25).all()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_weights_are_read_off_the_files_one_at_a_time(tmp_path, kind, monkeypatch):
    """A folder's files give the same table as a model that is built anew, which is then not built."""
    from transformers import AutoConfig, AutoModel, ByT5Tokenizer

    from analysis import weights
    from analysis.spectra_runs import run_table
    from bench.random_models import RANDOM

    names = dict(vocab_size=384, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    AutoModel.from_config(AutoConfig.for_model(kind, **RANDOM[kind], **names)).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    config = compose([f"model.path={tmp_path}", "task=rte", "data=standin", "method=lora"])
    model = weights.built(config).model
    for layer in weights.effective(model).values():
        layer += 0.1
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_files", lambda model: None)
        expected = run_table(model, config)
    monkeypatch.setattr(weights, "built", None)
    pd.testing.assert_frame_equal(run_table(model, config), expected)
    assert expected["changed"].all() and len(expected) == 12


def test_k_of_the_command(tmp_path, capsys):
    trained(tmp_path, "method=lora", "method.rank=2")
    assert main(["spectra", str(tmp_path / "runs"), "--k", "3"]) == 0
    assert "of the top 3 of 12 matrices" in capsys.readouterr().out
    assert main(["spectra", str(tmp_path / "runs"), "--k", "0"]) == 2
