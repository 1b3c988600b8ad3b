"""A plan counts what the runs then do: cells, steps, parameters, bytes, FLOPs; and says what will be skipped."""

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from bench import estimate
from bench import plan as planning
from bench.batches import longest
from bench.config import CONF, compose
from bench.estimate import cost, row_counts
from bench.footprint import footprint, fused
from bench.live import Live
from bench.measure import probe, saved_bytes
from bench.prepare import prepare
from bench.rows import load
from bench.run import run
from bench.shapes import SHAPES, skeleton
from bench.train import Loop

TINY = ["data=standin", "wandb=off", "train.epochs=null", "train.steps=4", "train.batch_size=8"]
LIMITS = ["task.limit.train=32", "task.limit.val=16", "task.limit.test=24"]


@pytest.mark.parametrize("path", sorted(SHAPES))
def test_a_shape_has_the_parameters_that_its_model_file_says(path):
    file = next(f for f in (CONF / "model").glob("*.yaml") if f"path: {path}\n" in f.read_text())
    said, unit = re.search(r"([\d.]+)([MB]) parameters", file.read_text()).group(1, 2)
    image = "kind: vision" in file.read_text()
    config = compose([f"model={file.stem}", "task=vtab_dtd" if image else "task=rte"])
    if config.model.path in ("google-t5/t5-base",):
        config.task = compose(["task=gsm8k"]).task
        config.task.model_class = "AutoModelForSeq2SeqLM"
    total = sum(p.numel() for p in skeleton(config.model, config.task).parameters())
    assert total == pytest.approx(float(said) * {"M": 1e6, "B": 1e9}[unit], rel=0.015)


@pytest.mark.parametrize("method", ("lora", "bitfit", "full_ft"))
@pytest.mark.parametrize("model, task", (("random_bert", "rte"), ("random_vit", "digits")))
def test_an_estimate_is_what_the_run_records(tmp_path, method, model, task):
    config = compose([f"method={method}", f"model={model}", f"task={task}", *TINY, *LIMITS, f"results={tmp_path}"])
    planned, record = cost(config), run(config)
    assert record.status == "ok", record.reason
    assert planned.steps == record.steps and planned.trained == record.trained_params
    assert sum(row_counts(config.task).values()) == sum(record.data["rows"].values()) == 32 + 16 + 24
    kinds = ("weights", "gradients", "optimizer")
    real = sum(record.memory[k] for k in kinds)
    assert planned.memory > real  # activations on top
    assert planned.memory == pytest.approx(record.memory["peak"], rel=0.02)  # a few tokens of a text are guessed
    if task == "digits":
        assert planned.memory == record.memory["peak"]
        assert planned.train == pytest.approx(record.flops["total_train"], rel=0.05)


WAYS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": "true"},
    "offload": {"offload": "activations"},
    "both": {"gradient_checkpointing": "true", "offload": "activations"},
}


def counted_and_planned(monkeypatch, *overrides, **train):
    """What a real micro-batch costs, and what its model's shape and its rows' lengths say; the most bytes at once in each."""
    monkeypatch.setattr("bench.offload.check", lambda *_: None)  # a CPU has no other memory, but it can count
    config = compose(
        ["data=standin", *LIMITS, "train.batch_size=4", *overrides, *(f"train.{k}={v}" for k, v in train.items())]
    )
    ready = prepare(config, load(config), torch.device("cpu"))
    encoded, image = ready.encoded["train"], config.task.kind == "image"
    lengths = [1] * 4 if image else sorted(map(encoded.length, range(len(encoded))))[-4:]
    loop = Loop(ready.model, ready.method, replace(config.train, offload="none"), steps=1, device=torch.device("cpu"))
    live, where = Live(ready.model), config.train.offload
    found = probe(ready.model, longest(encoded, 4), loop.loss, backward=ready.method.backward, offload=where, live=live)
    return ready, found | {"live": live.peak}, footprint(config, lengths)


def assert_same(found, planned):
    assert {k: planned[k] for k in found if k != "live"} == {k: n for k, n in found.items() if k != "live"}
    backward = planned["live"] - planned["optimizer"]
    assert backward == pytest.approx(max(found["live"], planned["weights"] + planned["gradients"]), rel=1e-3)


@pytest.mark.parametrize("padding", ("packed", "padded"))
@pytest.mark.parametrize("model", ("random_bert", "random_llama"))
@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_of_a_plan_are_those_of_the_run(monkeypatch, way, model, padding):
    overrides = ["method=lora", f"model={model}", "task=rte", f"train.padding={padding}"]
    ready, found, planned = counted_and_planned(monkeypatch, *overrides, **WAYS[way])
    assert ready.packed == (padding == "packed")
    assert ("offloaded" in found) == ("offload" in WAYS[way]) and found["activations"] > 0
    assert_same(found, planned)


@pytest.mark.parametrize("precision", ("bf16", "fp16", "bf16_full"))
def test_half_of_the_bytes_in_half_precision(monkeypatch, precision):
    _, found, planned = counted_and_planned(monkeypatch, "model=random_bert", "task=rte", precision=precision)
    assert_same(found, planned)


@pytest.mark.parametrize("method", ("full_ft", "adalora", "qlora", "prompt_tuning", "prefix_tuning", "ist", "mezo"))
def test_the_bytes_of_a_plan_are_those_of_the_run_for_other_methods(monkeypatch, method):
    _, found, planned = counted_and_planned(monkeypatch, f"method={method}", "model=random_bert", "task=rte")
    assert_same(found, planned)


@pytest.mark.parametrize("method", ("hft", "dylora"))
def test_what_draws_is_planned_too(method):
    assert cost(compose([f"method={method}", "model=random_vit", "task=digits", *TINY])).memory > 0


def test_on_a_gpu_attention_keeps_no_scores():
    with FakeTensorMode():
        query = torch.zeros(2, 4, 128, 16, requires_grad=True)
        mask = torch.ones(2, 1, 128, 128, dtype=torch.bool)
        scores, saved = query.nbytes // 16 * 128, []
        for how in (nullcontext(), fused()):
            with how:
                run = partial(
                    functional.scaled_dot_product_attention, query, query, query, attn_mask=mask, dropout_p=0.1
                )
                saved.append(saved_bytes(torch.nn.Module(), lambda run=run: run().sum()))
    assert saved[0] > 2 * scores > saved[1] >= 4 * mask.numel() + 2 * query.nbytes


def test_a_plan_says_what_makes_a_run_fit():
    overrides = ["method=lora", "model=random_bert", "task=rte", "train.batch_size=16"]
    config = compose(["data=standin", *LIMITS, *overrides])
    plain, checkpointing, offload, both = (
        cost(replace(config, train=replace(config.train, **switches)), gpu=True).memory
        for switches in ({}, *planning.SWITCHES)
    )
    assert checkpointing < plain and both < checkpointing
    assert planning._cost_of(config, plain).advice == ""
    assert planning._cost_of(config, checkpointing).advice.startswith(
        "out of memory; fits with train.gradient_checkpointing=true ("
    )
    said = planning.advice(config, min(offload, both))
    assert "fits with" in said and "train.offload=activations" in said
    said = planning.advice(config, 1000)
    assert said == f"out of memory, also with checkpointing and offload ({min(offload, both) / 2**30:.2f} GiB at least)"
    (line,) = planning.plan(["data=standin", *LIMITS, *overrides], checkpointing)
    assert "fits with train.gradient_checkpointing=true" in planning.table([line], {"fp32": 1e9})


@pytest.mark.parametrize("method", ("lora", "full_ft", "mezo"))
def test_many_classes_cost_what_counting_them_says(method):
    config = compose([f"method={method}", "model=random_vit", "task=vtab_dtd"])
    assert config.task.labels == 47 and estimate._counted(config, [1] * 8, at_once=True) == footprint(config, [1] * 8)


@pytest.mark.parametrize("model", ("deberta", "gpt2", "llama"))
def test_generated_rows_give_a_plan_their_number_and_their_length(model):
    config = compose([f"model=random_{model}", "task=rte", *TINY, *LIMITS])
    rows = config.task.load(config.data)
    assert row_counts(config.task, config.data) == {k: len(v) for k, v in rows.splits.items()}
    mean, longest = estimate.lengths(config)
    texts = rows.splits["train"].to_pandas()
    characters = texts["sentence1"].str.len() + texts["sentence2"].str.len()
    assert characters.mean() <= mean <= longest <= characters.max() + 10  # a byte is a token, and a few separate
    assert cost(config).flops > 0


def test_without_rows_a_plan_takes_a_usual_length_and_the_longest_allowed(tmp_path):
    config = compose(["model=roberta_base", "task=mnli", "data=real", f"data.root={tmp_path}", "task.max_length=200"])
    assert estimate.lengths(config) == (estimate.TOKENS, 200)


def test_a_grid_is_counted_cell_by_cell_and_says_what_is_skipped():
    lines = list(planning.plan(["method=lora,vpt_deep", "model=random_bert", "task=rte", "seed=0,1,2", *TINY]))
    assert [(x.method, x.runs, x.trainings) for x in lines] == [("lora", 3, 3.0), ("vpt_deep", 3, 3.0)]
    assert not lines[0].cost.note and lines[1].cost.note.startswith("skipped: visual prompts")
    text = planning.table(lines, {"fp32": 1e9})
    assert "skipped: visual prompts" in text and text.splitlines()[-1].split()[:2] == ["all", "3"]


@pytest.mark.slow
def test_processes_count_what_one_would():
    grid = ["method=lora,ia3,bitfit,full_ft,ln_tuning,dora,vera,vpt_deep", "model=random_bert", "task=rte,sst2", *TINY]
    assert list(planning.plan(grid, processes=2)) == list(planning.plan(grid))


def test_a_model_without_the_head_of_a_task_is_skipped_as_the_run_is():
    (line,) = planning.plan(["method=lora", "model=random_t5", "task=gsm8k", *TINY])
    assert line.cost.note.startswith("skipped: random:t5 cannot have the head of a generation task")


def test_tuning_counts_its_trials_rungs_and_tested_seeds():
    options = ["hydra.sweeper.trials=8", "hydra.sweeper.rungs=2", "hydra.sweeper.final_seeds=[1,2,3]"]
    lines = list(planning.plan(["experiment=tune_brief", "model=random_bert", "task=rte", *TINY, *options]))
    assert [x.method for x in lines] == ["bitfit", "lora", "ia3"]
    assert {x.runs for x in lines} == {8 + 4 + 3} and {x.trainings for x in lines} == {8 / 2 + 4 + 3}


def test_hours_are_flops_over_the_rate():
    (line,) = planning.plan(["method=lora", "model=random_bert", "task=rte", "seed=0", *TINY])
    hours = line.cost.flops / 1e6 / 3600
    assert f"{hours:.2f}" in planning.table([line], {"fp32": 1e6})


def test_the_calibration_measures_this_machine():
    planning.calibrate.cache_clear()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert 1e6 < planning.calibrate(seconds=0.1) < 1e16
    assert torch.equal(state, torch.get_rng_state())
    planning.calibrate.cache_clear()


def test_rows_follow_the_published_sizes_and_the_protocol():
    assert row_counts(compose(["task=vtab_dtd"]).task) == {"train": 800, "val": 200, "test": 1880}
    assert row_counts(compose(["task=rte"]).task)["train"] == 2490
    assert row_counts(compose(["task=mnli", "task.limit.train=100"]).task)["train"] == 100


def test_the_sum_holds_the_start_of_the_command_and_of_each_run():
    (line,) = planning.plan(["method=lora", "model=random_bert", "task=rte", "seed=0,1", *TINY])
    (alone,), (all_in,) = (
        re.findall(r"^all +2 +([\d.e-]+)", planning.table([line], {"fp32": 1e15}, beside=beside), re.M)
        for beside in (None, (7200.0, 3600.0))
    )
    assert float(all_in) - float(alone) == pytest.approx(2 + 2 * 1, abs=0.02)


@pytest.mark.slow
def test_what_a_command_takes_beside_its_steps_is_timed_on_a_real_one():
    start, each = planning.around()
    assert 0.01 < each < start


def test_options_stand_anywhere_among_the_overrides(monkeypatch, capsys):
    given = ["bench.plan", "method=lora", "--gpu", "a100", "model=random_bert", "task=rte"]
    monkeypatch.setattr("sys.argv", given)
    assert planning.main() == 0
    assert "lora" in (shown := capsys.readouterr().out) and "A100" in shown.upper()
