"""Runs trained at once over one backbone: the same numbers as one by one, whatever becomes of the others."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus

from bench import fused_modules, fused_size
from bench.config import compose
from bench.fused import Team
from bench.fused_launcher import teams
from bench.fused_processes import apart
from bench.record import Record
from bench.run import run
from bench.turns import Request, Turns, member

ROOT = Path(__file__).parents[1]
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TEXT = dict(vocab_size=384, pad_token_id=0, eos_token_id=1, max_position_embeddings=160)
DROP = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of tiny models: pretrained weights are what all seeds share."""
    import transformers as t

    folder = tmp_path_factory.mktemp("backbones")
    configs = {
        "bert": t.BertConfig(**TINY, **TEXT, **DROP),
        "llama": t.LlamaConfig(**TINY, **TEXT, num_key_value_heads=2),
        "vit": t.ViTConfig(**TINY, **DROP, image_size=16, patch_size=8),
    }
    torch.manual_seed(0)
    for name, config in configs.items():
        auto = t.AutoModelForCausalLM if name == "llama" else t.AutoModel
        auto.from_config(config).save_pretrained(folder / name)
        t.ByT5Tokenizer(model_max_length=128).save_pretrained(folder / name)
    t.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    return folder


@pytest.fixture
def cells(backbones, tmp_path):
    """Configurations of tiny runs, their results in a folder of that name."""

    def make(name, variants, *overrides, kind="bert", task="rte"):
        model = {"bert": "bert_base", "llama": "llama32_1b", "vit": "vit_b16"}[kind]
        given = [f"model={model}", f"model.path={backbones / kind}", f"task={task}", "data=standin", "wandb=off"]
        given += ["task.limit={train:40,val:16,test:16}", "train.steps=8", "train.batch_size=4", "train.eval_every=4"]
        given += ["train.checkpoint_seconds=null", "device=cpu", f"results={tmp_path / name}", *overrides]
        return [compose([*given, *v]) for v in variants]

    return make


def at_once(configs, **options):
    return Team(**{"timed": False} | options).run([lambda c=c: run(c) for c in configs])


def losses(record):
    return [row["train/loss"] for row in record.history if "train/loss" in row]


def assert_same(fused_runs, alone, results):
    for a, b in zip(fused_runs, alone, strict=True):
        assert (a.status, a.id) == (b.status, b.id), a.traceback
        assert losses(a) == pytest.approx(losses(b), rel=0, abs=1e-6)
        assert (a.selected_step, a.steps, a.score) == (b.selected_step, b.steps, b.score)
        if a.status == "ok":
            tables = [pd.read_parquet(results / name / a.id / "predictions.parquet") for name in ("fused", "alone")]
            assert (tables[0].prediction == tables[1].prediction).all()


def fused_counts(records):
    return [r.environment.get("fused", {}).get("runs", 1) for r in records]


SEEDS = [["seed=0"], ["seed=1", "train.lr=1e-2", "train.weight_decay=0.1"], ["seed=2", "train.schedule=constant"]]
RANKS = [[*SEEDS[0], "method.rank=2"], [*SEEDS[1], "method.alpha=64"], [*SEEDS[2], "method.dropout=0.3"]]
METHODS = {
    "lora": (RANKS, ["method=lora", "method.dropout=0.1"]),
    "every_linear": (RANKS, ["method=lora", "method.targets=all_linear", "method.bias=all"]),
    "dora": (SEEDS, ["method=dora"]),
    "ia3": (SEEDS, ["method=ia3"]),
    "houlsby": (SEEDS, ["method=houlsby"]),
    "parallel_adapter": (SEEDS, ["method=parallel_adapter"]),
    "bitfit": (SEEDS, ["method=bitfit"]),
    "ln_tuning": (SEEDS, ["method=ln_tuning"]),
    "linear_probe": (SEEDS, ["method=linear_probe"]),
    "adalora": (SEEDS, ["method=adalora"]),
    "increlora": ([["seed=0"], ["seed=1"], ["seed=2"]], ["method=increlora"]),  # counts importance, grows
    "mezo": (SEEDS, ["method=compose", "method.parts={lora: {rank: 4}, mezo: {}}"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_numbers_as_one_by_one(name, cells, tmp_path):
    variants, overrides = METHODS[name]
    records = at_once(cells("fused", variants, *overrides))
    assert fused_counts(records) == [3, 3, 3], records[0].reason
    assert_same(records, [run(c) for c in cells("alone", variants, *overrides)], tmp_path)


@pytest.mark.parametrize(
    ("kind", "task", "more"), [("llama", "gsm8k", ["task.max_new_tokens=4"]), ("vit", "digits", [])]
)
def test_decoders_and_images(kind, task, more, cells, tmp_path):
    records = at_once(cells("fused", SEEDS, "method=lora", *more, kind=kind, task=task))
    assert fused_counts(records) == [3, 3, 3], records[0].traceback
    assert_same(records, [run(c) for c in cells("alone", SEEDS, "method=lora", *more, kind=kind, task=task)], tmp_path)


FATES = [
    ["seed=0", "train.patience=1", "train.eval_every=2", "train.lr=0"],  # ends early
    ["seed=1", "train.lr=inf", "train.clip=null", "train.warmup=0"],  # diverges
    ["seed=2", "method.targets=nothing"],  # is skipped
    ["seed=3", "train.accumulate=2", "train.steps=11"],  # a last batch of one part, and is the last alone
]


def test_the_end_of_one_run_is_not_that_of_the_others(cells, tmp_path):
    limit = "task.limit={train:37,val:16,test:16}"
    records = at_once(cells("fused", FATES, "method=lora", limit))
    assert [r.status for r in records] == ["ok", "diverged", "skipped", "ok"]
    assert records[0].steps < 8 and fused_counts(records)[0::3] == [3, 3]
    assert_same(records, [run(c) for c in cells("alone", FATES, "method=lora", limit)], tmp_path)


@pytest.mark.parametrize("method", [["method=full_ft"], ["method=prompt_tuning", "method.length=4"]])
def test_what_shares_nothing_trains_in_turn(method, cells, caplog):
    caplog.set_level(logging.INFO, "bench")
    records = at_once(cells("fused", SEEDS[:2], *method))
    assert [r.status for r in records] == ["ok", "ok"] and fused_counts(records) == [1, 1]
    assert "not fused, in turn: no weight matrix" in caplog.text
    assert records[0].time["step"] > 0 and records[0].memory["peak"] > 0


@pytest.mark.parametrize("fails", [2, 5])  # a backward; later a forward
def test_where_a_pass_fails_every_run_begins_anew_alone(fails, cells, tmp_path, monkeypatch, caplog):
    calls = []
    respond = Team._respond

    def full(team, group):
        calls.append(len(group))
        if len(calls) == fails:
            raise torch.OutOfMemoryError("no room for two")
        respond(team, group)

    monkeypatch.setattr(Team, "_respond", full)
    records = at_once(cells("fused", RANKS[:2], "method=lora"))
    assert len(calls) == fails and "every run begins anew, alone" in caplog.text
    assert fused_counts(records) == [1, 1]
    assert_same(records, [run(c) for c in cells("alone", RANKS[:2], "method=lora")], tmp_path)


def test_a_wrong_pass_is_seen_before_it_trains(cells, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "bench")
    monkeypatch.setattr(fused_modules.EachDropout, "forward", lambda self, x: x)
    records = at_once(cells("fused", SEEDS[:2], "method=lora"))
    assert fused_counts(records) == [1, 1] and "it gives another result" in caplog.text
    assert_same(records, [run(c) for c in cells("alone", SEEDS[:2], "method=lora")], tmp_path)


def test_a_measured_size_holds_the_others_back(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(fused_size, "_best", lambda *a: 2)
    variants = [[f"seed={k}"] for k in range(4)]
    records = at_once(cells("fused", variants, "method=lora"), timed=True)
    assert fused_counts(records) == [2, 2, 2, 2]
    assert_same(records, [run(c) for c in cells("alone", variants, "method=lora")], tmp_path)


@pytest.mark.parametrize(("alone", "at_once", "best"), [(1.0, 0.9, 4), (1.0, 0.1, 4), (1.0, 9.0, None)])
def test_as_many_as_cost_the_least(alone, at_once, best, monkeypatch):
    monkeypatch.setattr(fused_size, "_seconds", lambda act, device: act())
    sizes = {"alone": lambda runs: alone * runs, "at_once": lambda runs: at_once * runs + 0.1}
    if best is None:
        with pytest.raises(fused_modules.Unfusable, match="alone costs less"):
            fused_size._best(**sizes, runs=4, device=torch.device("cpu"))
    else:
        assert fused_size._best(**sizes, runs=4, device=torch.device("cpu")) == best


def test_costs_are_shared_and_in_no_published_column(cells, tmp_path):
    from analysis.runs import load

    begun = time.perf_counter()
    records = at_once(cells("fused", SEEDS, "method=lora"))
    seconds = time.perf_counter() - begun
    assert 0 < sum(r.time["fused_total"] for r in records) < seconds
    (alone,) = [run(c) for c in cells("alone", SEEDS[:1], "method=lora")]
    assert records[0].memory["fused_peak"] == alone.memory["peak"] and records[0].flops == alone.flops
    table = load(tmp_path / "fused")
    costs = ["memory_peak", "time_step", "time_train", "time_total", "time_setup", "time_eval"]
    assert table[costs].isna().all(axis=None) and (table.environment_fused_runs == 3).all()


def test_one_backbone_lies_in_memory(cells):
    parts = []
    stack = Team._stack

    def note(team, found):
        parts.extend(found)
        return stack(team, found)

    team = Team(timed=False)
    team._stack = lambda found: note(team, found)
    team.run([lambda c=c: run(c) for c in cells("fused", RANKS, "method=lora")])
    places = [{p.data_ptr() for p in part.model.parameters() if not p.requires_grad} for part in parts]
    trained = [{p.data_ptr() for p in part.model.parameters() if p.requires_grad} for part in parts]
    assert places[0] == places[1] == places[2] and not trained[0] & trained[1]


def test_a_signal_stops_all_and_they_go_on_from_their_checkpoints(cells, tmp_path):
    team = Team(timed=False)
    forward, steps = team._forward, []

    def stop(group, requests):
        steps.append(0)
        if len(steps) == 3:
            team.signal(signal.SIGTERM, None)
        forward(group, requests)

    team._forward = stop
    stopped = team.run([lambda c=c: run(c) for c in cells("fused", RANKS, "method=lora")])
    assert [r.status for r in stopped] == ["interrupted"] * 3
    records = [run(c) for c in cells("fused", RANKS, "method=lora")]  # alone from there on
    assert fused_counts(records) == [3, 3, 3]
    assert_same(records, [run(c) for c in cells("alone", RANKS, "method=lora")], tmp_path)


def test_each_thread_draws_as_if_it_were_alone():
    def body(seed):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        drawn = []
        for _ in range(3):
            here = member()
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
            if here is not None:
                here.meet(Request())
        return drawn

    turns = Turns(lambda group: [m.answer(None) for m in group] and None)
    before = np.random.get_state()[1].tolist()
    assert turns.run([lambda s=s: body(s) for s in range(3)]) == [body(s) for s in range(3)]
    assert np.random.get_state()[1].tolist() != before  # the process's own generator is back, which `body` drew from


def test_a_member_that_fails_leaves_the_others_alone():
    def fails():
        raise KeyError("mine")

    def meets():
        return member().meet(Request())

    turns = Turns(lambda group: [m.answer(len(group)) for m in group] and None)
    with pytest.raises(KeyError, match="mine"):
        turns.run([fails, meets, meets])
    assert [m.result for m in turns.members] == [None, 2, 2]


def test_teams_keep_the_order_and_the_size():
    assert teams(["a", "b", "a", "a", "b"], 2) == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize(("processes", "seeds"), [(1, "0"), (2, "0,1")])
def test_the_launcher(processes, seeds, cells, backbones, tmp_path):
    """Two of one kin at once in each process, records and table as ever."""
    given = [
        "method=lora,bitfit",
        f"seed={seeds}",
        f"hydra.launcher.processes={processes}",
        "train.lr=1e-3",
        "task=rte",
        "data=standin",
        "model=bert_base",
        "wandb=off",
    ]
    given += [
        f"model.path={backbones / 'bert'}",
        "task.limit={train:24,val:8,test:8}",
        "train.steps=3",
        "train.batch_size=4",
    ]
    given += [
        f"results={tmp_path / 'fused'}",
        "hydra/launcher=fused",
        "hydra.launcher.timed=false",
        "train.weight_decay=0,0.1",
    ]
    command = [sys.executable, "-m", "bench", "-m", *given, "device=cpu", "threads=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [Record.load(p) for p in (tmp_path / "fused").glob("*/record.json")]
    runs = 2 * processes
    assert sorted((r.method, r.status) for r in records) == [("bitfit", "ok")] * runs + [("lora", "ok")] * runs
    assert fused_counts(records) == [2] * 2 * runs, done.stdout
    assert sum(" ok " in line for line in done.stdout.splitlines()) == 2 * runs
    assert json.loads((tmp_path / "fused" / records[0].id / "record.json").read_text())["environment"]["fused"]["rule"]


def test_what_dies_with_its_process_has_failed():
    def body(part):
        if part == ["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=f"error: {job}") for job in part]

    dead, alive = apart([["dies"], ["a", "b"]], body)
    assert [job.return_value for job in alive] == ["error: a", "error: b"]
    with pytest.raises(RuntimeError, match="1 runs died of SIGKILL"):
        dead[0].return_value  # noqa: B018
