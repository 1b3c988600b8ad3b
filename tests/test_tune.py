"""Tuning: the same trials for every method, on val alone; the test split opens only for a recorded choice."""

import json
import math
import sys

import numpy as np
import pytest
import yaml

from analysis import runs as analysis_runs
from bench.__main__ import command_line
from bench.config import CONF, compose
from bench.record import Record
from bench.run import run
from bench.selection import selection_file
from bench.space import Dimension, Proposals, points, space
from methods import METHODS

TINY = [
    "model=random_bert", "task=rte", "data=standin", "wandb=off", "train.epochs=null", "train.steps=4",
    "task.limit.train=32", "task.limit.val=32", "task.limit.test=16",
]  # fmt: skip


def bench(results, *arguments):
    """What `python -m bench` does, in this process; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        where = f"--config-path={CONF}"  # as `-m` finds it
        patch.setattr(sys, "argv", ["bench", where, "experiment=tune_brief", *TINY, f"results={results}", *arguments])
        try:
            return command_line()
        except SystemExit as stop:
            return stop.code


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    results = tmp_path_factory.mktemp("tuned")
    assert not bench(results, "method=ia3,lora", "hydra.sweeper.trials=3", "hydra.sweeper.final_seeds=[1]")
    return results


def records(folder):
    return [Record.load(path) for path in sorted(folder.glob("*/record.json"))]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_declares_at_most_one_dimension_of_its_own(name):
    dimensions = space(METHODS[name]())
    assert dimensions[0].key == "train.lr" and dimensions[0].default == METHODS[name]().lr
    assert len(dimensions) <= 2


@pytest.mark.parametrize("sampler", ("sobol", "random", "optuna"))
def test_a_sequence_of_trials_follows_from_its_seed_and_begins_with_the_papers_values(sampler):
    if sampler == "optuna":
        pytest.importorskip("optuna")
    dimensions = space(METHODS["houlsby"]())

    def sequence(n, seed):
        proposals = Proposals(dimensions, n, sampler, seed)
        asked = []
        for _ in range(n):
            asked.append(proposals.ask())
            proposals.tell(-abs(math.log10(asked[-1]["train.lr"] / 1e-3)))
        return asked

    assert sequence(9, 0)[0] == {"train.lr": 3e-4, "method.width": 64}
    assert sequence(9, 0) == sequence(9, 0) == sequence(12, 0)[:9] != sequence(9, 1)
    for values in sequence(9, 0):
        assert 3e-5 <= values["train.lr"] <= 3e-3 and values["method.width"] in (8, 64, 256)


def test_methods_are_asked_at_the_same_points_relative_to_their_own_rates():
    rates = [
        [p["train.lr"] / METHODS[n].lr for p in points(space(METHODS[n]()), 8, "sobol", 0)] for n in ("lora", "ia3")
    ]
    assert np.allclose(rates[0], rates[1], rtol=1e-3) and len(set(rates[0])) == 8


def test_sobol_points_cover_a_logarithmic_range_evenly():
    values = [p["train.lr"] for p in points([Dimension("train.lr", 1e-3, low=1e-4, high=1e-2)], 65, "sobol", 0)][1:]
    assert np.histogram(np.log10(values), bins=8, range=(-4, -2))[0].tolist() == [8] * 8


def test_a_space_that_is_none_is_refused():
    with pytest.raises(ValueError, match="cannot be searched"):
        Dimension("method.rank", 3, choices=(1, 2))
    with pytest.raises(ValueError, match="cannot be searched"):
        Dimension("train.lr", 0.0, low=0.0, high=1.0)


def test_every_method_gets_its_trials_on_val_alone(tuned):
    trials = records(tuned / "trials")
    assert [sum(t.method == m for t in trials) for m in ("ia3", "lora")] == [3, 3]
    for trial in trials:
        assert trial.status == "ok" and trial.score is None and trial.seed == 0
        assert not [k for k in trial.metrics if k.startswith("test/")]


def test_the_choice_is_the_best_on_val_and_names_its_trials(tuned):
    selection = json.loads(selection_file(tuned, "ia3_random_bert_rte").read_text())
    found = {r.id: r for r in records(tuned / "trials") if r.method == "ia3"}
    assert {t["id"] for t in selection["trials"]} == set(found)
    vals = {id: r.metrics["val/accuracy"] for id, r in found.items()}
    assert selection["val"] == max(vals.values()) == vals[selection["winner"]]
    text = (tuned / "best" / "ia3_random_bert_rte.yaml").read_text()
    assert yaml.safe_load(text)["train"]["lr"] == found[selection["winner"]].config["train"]["lr"]
    assert all(id in text for id in found) and "python -m bench experiment=tune_brief" in text


def test_the_chosen_values_are_tested_on_another_seed(tuned):
    finals = records(tuned)
    assert sorted((r.method, r.seed, r.status) for r in finals) == [("ia3", 1, "ok"), ("lora", 1, "ok")]
    for r in finals:
        assert r.score is not None
        chosen = json.loads(selection_file(tuned, f"{r.method}_random_bert_rte").read_text())
        assert r.config["train"]["lr"] == chosen["values"]["train.lr"]


def test_going_on_trains_only_what_is_new(tuned):
    before = {p: p.stat().st_mtime_ns for p in tuned.glob("**/record.json")}
    assert not bench(tuned, "method=ia3,lora", "hydra.sweeper.trials=4", "hydra.sweeper.final_seeds=[1]")
    after = {p: p.stat().st_mtime_ns for p in tuned.glob("**/record.json")}
    assert {p: t for p, t in after.items() if p in before} == before
    assert len([p for p in set(after) - set(before) if p.parts[-3] == "trials"]) == 2


def cell(results, *more):
    config = compose(["method=ia3", *TINY, "~best", "test=selected", f"results={results}", *more])
    return run(config)


def test_without_a_recorded_choice_the_test_split_stays_locked(tmp_path):
    record = cell(tmp_path, "train.lr=1e-3", "seed=1")
    assert record.status == "failed" and "locked until a choice on val" in record.reason
    assert record.score is None and not record.metrics


@pytest.mark.parametrize(
    "change, reason",
    [(["train.lr=0.123", "seed=1"], "is not the chosen"), (["seed=0"], "has chosen the values")],
)
def test_other_values_and_the_seed_of_the_trials_stay_locked(tuned, change, reason):
    chosen = json.loads(selection_file(tuned, "ia3_random_bert_rte").read_text())["values"]
    record = cell(tuned, f"train.lr={chosen['train.lr']}", *change, "force=true")
    assert record.status == "failed" and reason in record.reason
    (tuned / record.id / "record.json").unlink()


def test_a_choice_whose_trials_have_no_records_opens_nothing(tuned, tmp_path):
    source = selection_file(tuned, "ia3_random_bert_rte")
    copy = selection_file(tmp_path, "ia3_random_bert_rte")
    copy.parent.mkdir(parents=True)
    copy.write_text(source.read_text())
    record = cell(tmp_path, f"train.lr={json.loads(source.read_text())['values']['train.lr']}", "seed=1")
    assert record.status == "failed" and "without a record" in record.reason


def test_curves_of_best_at_n_read_the_trials(tuned):
    from analysis.tuning import curve

    runs = analysis_runs.load(tuned / "trials")
    table = curve(runs.assign(val=runs["metrics_val/accuracy"]))
    assert set(table["method"]) == {"ia3", "lora"} and table["val"].notna().all() and table["test"].isna().all()


def test_halving_gives_every_method_the_same_optimizer_steps(tmp_path):
    pytest.importorskip("optuna")
    options = ["trials=4", "rungs=2", "factor=2", "sampler=optuna", "final_seeds=[]"]
    assert not bench(tmp_path, "method=ia3,lora", *(f"hydra.sweeper.{o}" for o in options))
    chosen = [json.loads(selection_file(tmp_path, f"{m}_random_bert_rte").read_text()) for m in ("ia3", "lora")]
    assert [c["steps"] for c in chosen] == [4 * 2 + 2 * 4] * 2
    for c in chosen:
        assert [t["rung"] for t in c["trials"]] == [0] * 4 + [1] * 2
        assert c["winner"] in [t["id"] for t in c["trials"] if t["rung"] == 1]
    assert not list(tmp_path.glob("*/record.json"))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("test=open", "is set by tuning itself"),
        ("hydra.sweeper.final_seeds=[0]", "the seed of the trials"),
        ("hydra.sweeper.sampler=grid", "the options are sobol, random, optuna"),
    ],
)
def test_what_would_open_the_lock_is_refused(tmp_path, capfd, argument, message):
    assert bench(tmp_path, argument) and message in capfd.readouterr().err
    assert not list(tmp_path.glob("**/record.json"))


@pytest.mark.parametrize("file", sorted((CONF / "experiment").glob("tune_*.yaml")), ids=lambda file: file.stem)
def test_a_tuning_experiment_is_a_tuning_experiment(file):
    values = yaml.safe_load(file.read_text())
    assert {"override /hydra/sweeper": "tune"} in values["defaults"]
    assert values["hydra"]["mode"] == "MULTIRUN"
