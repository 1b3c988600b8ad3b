"""Scaled intruders, spectra over a training, chains of tasks."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.__main__ import main
from analysis.causal import Cut, changes, chosen, cuts, effects, effects_text, scaled, sweep
from analysis.causal_plots import against, dynamics, lambdas, life, stages
from analysis.continual import average_forgetting, chain, save_merged
from analysis.dynamics import births, track
from analysis.spectra import intruders, measure
from analysis.spectra_model import headline
from analysis.spectra_runs import run_table
from bench.config import compose
from bench.model import build, merge
from bench.prepare import find_device, prepare
from bench.run import run
from methods.base import Unsupported
from tests.test_spectra import DIAGONAL, spiked

TINY = ["task=rte", "data=standin", "task.limit={train:16,val:8,test:8}", "task.max_length=32", "wandb=off"]
LARGE = ["method.rank=2", "train.lr=0.3", "train.steps=4", "train.batch_size=8"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


def planted(kind):
    """A prepared model whose LoRA is so large that every target matrix has an intruder."""
    config = compose([*TINY, f"model=random_{kind}", "method=lora", "method.rank=1"])
    ready = prepare(config, config.task.load(config.data, 0), find_device(config))
    with torch.no_grad():
        for name, p in ready.model.named_parameters():
            if name.endswith(".B"):
                p.copy_(torch.ones_like(p))
    return config, ready


@pytest.mark.parametrize(
    ("cosines", "which", "expected"),
    [
        ([0.9, 0.2, 0.8, 0.3], "top", ([1], [0])),
        ([0.9, 0.2, 0.8, 0.3], "all", ([1, 3], [0, 2])),
        ([0.1, 0.2], "all", ([0, 1], [])),
        ([0.9, 0.8], "top", ([], [])),
    ],
)
def test_which_vectors_are_scaled(cosines, which, expected):
    assert chosen(cosines, which) == expected


@pytest.mark.parametrize(
    ("factor", "left", "distance", "largest"),
    [(0, 0, 0.71518, 0.99664), (0.3, 0, 0.43962, 0.99664), (0.5, 1, 0.79436, 1.27465), (1, 1, 2.0, 2.5493), (1.5, 1, 3.2586, 3.82394)],
)  # fmt: skip
def test_scaling_a_planted_spike(factor, left, distance, largest):
    """Values of the reference for W0 = diag(64..1) / 64 and a spike of 2 along the mean of all vectors."""
    W0, W1 = DIAGONAL, spiked(2.0)
    U, S, Vh = torch.linalg.svd(W1)
    weight = W1.clone()
    cut = Cut("w", weight, slice(None), U[:, :1] * S[0], Vh[:1].T, [0])
    with scaled([cut], factor):
        found = measure(W0, weight)
        assert intruders(found["cos_left"]) == left
        assert float((weight - W0).norm()) == pytest.approx(distance, abs=2e-5)
        assert found["sigma_after"][0] == pytest.approx(largest, abs=2e-5)
    assert torch.equal(weight, W1)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_sweep_leaves_the_model_as_it_was(kind):
    config, ready = planted(kind)
    merge(ready.model)
    found = cuts(ready.model, config)
    assert len(found["intruder"]) >= 2 and all(len(cut.indices) == 1 for cut in found["intruder"])
    before = headline(run_table(ready.model, config))["intruders"]
    with scaled(found["intruder"], 0.0):
        assert headline(run_table(ready.model, config))["intruders"] < before
    state = {n: t.clone() for n, t in ready.model.state_dict().items()}
    table = sweep(ready, config, [0.0, 1.0])
    assert len(table) == 4 and set(table["vector"]) == {"intruder", "neighbour"}
    one = table[table["lambda"] == 1]
    own = ready.task.score(ready.predict("val", config))[ready.task.metric]
    assert (one["score"] == own).all() and one["forgetting"].nunique(dropna=False) == 1
    assert all(torch.equal(state[n], t) for n, t in ready.model.state_dict().items())
    if kind == "gpt2":  # a decoder: its loss on a text moves with the factor
        assert table["forgetting"].notna().all() and table["forgetting"].nunique() == 3
    else:
        assert table["forgetting"].isna().all() and "mask token" in table.attrs["reason"]


def test_without_intruders_there_is_nothing_to_scale():
    config = compose([*TINY, "model=random_bert", "method=lora"])
    ready = prepare(config, config.task.load(config.data, 0), find_device(config))
    with pytest.raises(Unsupported, match="nothing to scale"):
        sweep(ready, config, [1.0])


def test_a_locked_test_split_stays_locked():
    config, ready = planted("bert")
    config.test = "locked"
    with pytest.raises(ValueError, match="sweep on val"):
        sweep(ready, config, [1.0], split="test")


def test_changes_are_against_the_model_itself():
    rows = [("a", "intruder", 0, 0.5), ("a", "intruder", 1, 0.7), ("b", "intruder", 0, 0.6), ("b", "intruder", 1, 0.6)]
    table = pd.DataFrame(rows, columns=["run", "vector", "lambda", "score"])
    found = changes(table).set_index("lambda")
    assert found.loc[0, "mean"] == pytest.approx(-0.1) and found.loc[0, "low"] == pytest.approx(-0.2)
    assert found.loc[1, ["mean", "low", "high"]].tolist() == [0, 0, 0]
    assert len(lambdas(table).lines) == 3
    with pytest.raises(ValueError, match="add 1 to --lambdas"):
        changes(table[table["lambda"] == 0])


def test_effects_over_runs_have_an_interval_and_a_paired_control():
    rows = [
        (run, vector, factor, score)
        for run, spike, near in (("a", 0.5, 0.6), ("b", 0.4, 0.5), ("c", 0.6, 0.7))
        for vector, cut in (("intruder", spike), ("neighbour", near))
        for factor, score in ((0, cut), (1, 0.8))
    ]
    table = pd.DataFrame(rows, columns=["run", "vector", "lambda", "score"]).assign(forgetting=float("nan"))
    found = effects(table).set_index("lambda")
    assert found.loc[0, ["intruder", "neighbour", "difference"]].tolist() == pytest.approx([-0.3, -0.2, -0.1])
    assert found.loc[0, "intruder ±"] == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t of 2 degrees, sd 0.1
    assert found.loc[0, "difference ±"] == pytest.approx(0, abs=1e-9) and found.loc[1, "intruder"] == 0
    said = effects_text(table)
    assert "| 0 | -0.300 ± 0.248 | -0.200 ± 0.248 | -0.100 ± 0.000 |" in said and "forgetting" not in said
    assert "3 runs" in said and "| 1 | +0.000" in said


def test_spectra_during_training_change_no_number(tmp_path, capsys):
    overrides = [*TINY, *LARGE, "model=random_bert", "method=lora", "train.select=last"]
    plain = run(compose([*overrides, f"results={tmp_path / 'plain'}"]))
    seen = run(compose([*overrides, f"results={tmp_path / 'seen'}", "spectra_every=2", "spectra=true"]))
    assert seen.status == "ok", seen.traceback
    assert seen.id == plain.id and seen.metrics == plain.metrics
    table = pd.read_parquet(tmp_path / "seen" / seen.id / "dynamics.parquet")
    assert table["step"].unique().tolist() == [2, 4] and len(table) == 24
    found = births(table).set_index("step")
    assert found.loc[4, "intruders"] == seen.spectra["intruders"] > 0
    assert [h["spectra/intruders"] for h in seen.history if "spectra/intruders" in h] == found["intruders"].tolist()
    frozen = table[~table["changed"] & (table["step"] == 4)]
    assert len(frozen) == 8 and np.allclose(np.stack(frozen["turn"]), 1, atol=1e-5)
    name = next(r["name"] for _, r in table[table["step"] == 4].iterrows() if min(r["cos_left"]) < 0.5)
    one = track(table, name)
    assert one["step"].tolist() == [2, 4] and one["cosine"].iloc[-1] < 0.5 and 0 < one["turn"].iloc[-1] <= 1
    with pytest.raises(ValueError, match="no matrix"):
        track(table, "nowhere")
    assert len(life(one).lines) == 2 and len(dynamics(births(table)).lines) == 1
    assert main(["dynamics", str(tmp_path / "seen"), "-o", str(tmp_path / "d.png")]) == 0
    assert (tmp_path / "d.png").stat().st_size > 1000 and "born" in capsys.readouterr().out
    assert main(["dynamics", str(tmp_path / "plain")]) == 2
    with pytest.raises(ValueError, match="spectra_every=0"):
        compose([*overrides, "spectra_every=0"])


def test_command_of_the_sweep(tmp_path, capsys):
    record = run(compose([*TINY, *LARGE, "model=random_bert", "method=lora", f"results={tmp_path}"]))
    assert main(["causal", str(tmp_path), "--lambdas", "0,1", "-o", str(tmp_path / "l.png")]) == 0
    assert "score neighbour" in capsys.readouterr().out and (tmp_path / "l.png").exists()
    table = pd.read_parquet(tmp_path / record.id / "causal.parquet")
    val = record.metrics["val/accuracy"]
    assert table.loc[table["lambda"] == 1, "score"].tolist() == [val, val] and set(table["split"]) == {"val"}
    assert set(table["task"]) == {"rte (stand-in)"} and lambdas(table).get_title() == "rte (stand-in)"
    assert main(["causal", str(tmp_path), "--lambdas", "a"]) == 2


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_model_starts_the_next_stage(tmp_path, kind):
    config, ready = planted(kind)
    folder = save_merged(ready, tmp_path / "merged")
    config.model.path = str(folder)
    built = build(config.model, config.task)
    assert built.head  # a new one
    ids = torch.randint(3, 300, (2, 12))
    with torch.no_grad():
        old, new = (m.base_model(input_ids=ids).last_hidden_state for m in (ready.model.eval(), built.model.eval()))
    torch.testing.assert_close(old, new)


def test_what_cannot_be_merged_ends_the_chain(tmp_path):
    config = compose([*TINY, "model=random_bert", "method=houlsby"])
    ready = prepare(config, config.task.load(config.data, 0), find_device(config))
    with pytest.raises(Unsupported, match="cannot be merged"):
        save_merged(ready, tmp_path)


def test_a_chain_of_two_tasks(tmp_path):
    overrides = ["model=random_bert", "method=lora", *LARGE, *TINY[1:]]
    table = chain(["rte", "cola"], overrides, tmp_path)
    assert table["stage"].tolist() == [0, 0, 1, 1, 2, 2] and table["score"].notna().all()
    assert set(table["task"]) == set(table["trained"].dropna()) == {"rte (stand-in)", "cola (stand-in)"}
    last = table[table["stage"] == 2].iloc[0]
    records = [json.loads(p.read_text()) for p in tmp_path.glob("*/record.json")]
    assert len(records) == 8 and {r["method"] for r in records} == {"lora", "linear_probe"}
    assert {r["model"] for r in records} == {"random_bert", "random_bert after rte", "random_bert after rte, cola"}
    own = next(r for r in records if r["id"] == last["record"])
    assert own["spectra"]["intruders"] == last["intruders"] and last["intruders_total"] > 0
    assert len(stages(table).collections) == 2
    again = chain(["rte", "cola"], overrides, tmp_path)
    pd.testing.assert_frame_equal(again, table)


def test_average_forgetting_is_the_fall_from_the_best():
    rows = [(0, None, "a", 0.5), (0, None, "b", 0.5), (1, "a", "a", 0.9), (1, "a", "b", 0.4), (2, "b", "a", 0.6), (2, "b", "b", 0.8)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["stage", "trained", "task", "score"])
    assert average_forgetting(table) == pytest.approx(0.3)


def test_marks_of_runs_need_both_numbers():
    runs = pd.DataFrame({"method": ["a", "b", "b"], "spectra_intruders": [1.0, 2, None], "forgetting_forgetting": [0.1, 0.2, 0.3]})  # fmt: skip
    assert "Spearman 1.00, 2 runs" in against(runs).get_title()
    with pytest.raises(ValueError, match="no run has both"):
        against(runs.iloc[2:])


def test_the_command_has_the_defaults_of_the_paper():
    from analysis import causal, spectra, spectra_command

    assert spectra_command.K == spectra.K and spectra_command.WHICH == causal.WHICH
    assert [float(x) for x in spectra_command.LAMBDAS.split(",")] == list(causal.LAMBDAS)
