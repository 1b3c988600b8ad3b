"""The untrained model is a row of the table like any other: no steps, no trained parameters, test scored once."""

import json

import pytest
import torch

from analysis import load
from bench.evaluate import evaluate
from bench.random_models import random_model
from bench.run import run
from tests.test_run import config

WORDS = ["model=random_llama", "task=rte_choice"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    return folder, [run(config(folder, *WORDS, f"method={name}")) for name in ("zero_shot", "lora")]


def test_nothing_is_trained(records):
    folder, (zero, lora) = records
    assert zero.status == "ok", zero.traceback
    assert (zero.steps, zero.selected_step, zero.trained_params, zero.stored_params) == (0, 0, 0, 0)
    assert zero.flops["train_step"] == zero.flops["total_train"] == 0 < zero.flops["forward"]
    assert zero.memory["gradients"] == zero.memory["optimizer"] == 0 and zero.time["step"] is None
    assert zero.score == zero.metrics["test/accuracy"] and "val/accuracy" in zero.metrics
    assert evaluate(folder / zero.id)["changed"] == 0
    assert zero.data["fingerprints"] == lora.data["fingerprints"]


def test_its_scores_are_those_of_the_pretrained_model(records):
    """LoRA starts as the pretrained model: with a learning rate of nothing it stays there."""
    folder, (zero, _) = records
    still = run(config(folder, *WORDS, "method=lora", "train.lr=0"))
    assert still.status == "ok" and still.metrics["test/answer_logprob"] == pytest.approx(
        zero.metrics["test/answer_logprob"], abs=1e-5
    )


def test_the_table_has_its_row(records):
    folder, (zero, _) = records
    runs = load(folder)
    row = runs[runs["method"] == "zero_shot"].iloc[0]
    assert row["score"] == zero.score and row["trained_params"] == 0
    from analysis.__main__ import main

    assert main(["table", str(folder)]) == 0
    report = folder / "report.html"
    assert main(["report", str(folder), "-o", str(report)]) == 0
    assert "zero_shot" in report.read_text()


def test_a_new_head_cannot_answer_untrained(tmp_path):
    one = run(config(tmp_path, "method=zero_shot"))
    assert one.status == "skipped" and "new task head" in one.reason


def test_the_model_is_left_as_it_is():
    from methods import METHODS

    method, model = METHODS["zero_shot"](), random_model("llama")
    before = json.dumps({n: float(p.sum()) for n, p in model.named_parameters()})
    optimizer = method.optimizer(method.apply(model, iter(())), 1.0, 0.1)
    optimizer.step()
    assert json.dumps({n: float(p.sum()) for n, p in model.named_parameters()}) == before
    assert not {id(p) for g in optimizer.param_groups for p in g["params"]} & {id(p) for p in model.parameters()}
    assert not any(p.requires_grad for p in model.parameters()) and isinstance(optimizer, torch.optim.Optimizer)
