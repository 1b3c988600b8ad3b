"""`method=compose`: parts keep their own promises beside each other, and what cannot be combined says so."""

import itertools
import re
from dataclasses import dataclass

import pytest
import torch

from bench.measure import optimizer_bytes
from bench.model import counts, load_trained_state, trained_state
from bench.random_models import random_model
from methods import METHODS, Unsupported
from methods.base import Part, rest
from tests.test_methods import batch_of, learn, logits, perturb
from tests.test_optimizers import loop_of, resumes_bit_for_bit
from tests.test_train import Batches


def compose(**parts):
    return METHODS["compose"](parts=parts)


def applied(method, kind="bert", seed=0):
    torch.manual_seed(seed)
    return method.apply(random_model(kind), itertools.repeat(batch_of(kind)))


def test_two_adapters_act_at_once_and_reload():
    model = applied(compose(lora={"rank": 2}, bitfit={}))
    names = set(trained_state(model))
    assert any(n.endswith(".A") for n in names) and any(n.endswith("bias") and "classifier" not in n for n in names)
    perturb(model)
    fresh = applied(compose(lora={"rank": 2}, bitfit={}), seed=1)
    load_trained_state(fresh, trained_state(model))
    torch.testing.assert_close(logits(fresh, batch_of("bert")), logits(model, batch_of("bert")))


def test_one_part_is_that_method():
    alone, composed = applied(METHODS["lora"](rank=3)), applied(compose(lora={"rank": 3}))
    torch.testing.assert_close(trained_state(alone), trained_state(composed))


@dataclass
class Doubled(Part):
    """A part that brings an optimizer."""

    def optimizer(self, model, lr, weight_decay):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr * 2)


@dataclass
class Tired(Part):
    """A schedule: the first trained parameter rests for ever."""

    def attach(self, model):
        rest([next(p for p in model.parameters() if p.requires_grad)])


def test_parts_act_on_what_the_others_train(monkeypatch):
    monkeypatch.setitem(METHODS, "doubled", Doubled)
    monkeypatch.setitem(METHODS, "tired", Tired)
    method = compose(lora={"rank": 2}, doubled={}, tired={})
    model = applied(method)
    assert isinstance(method.optimizer(model, 0.1, 0.0), torch.optim.SGD)
    resting = [p for p in model.parameters() if getattr(p, "resting", False)]
    assert len(resting) == 1 and not resting[0].requires_grad
    before = resting[0].clone()
    learn(method, model.train(), batch_of("bert"), 1e-2, steps=3)
    assert torch.equal(resting[0], before)
    assert sum(t.numel() for t in trained_state(model).values()) == sum(
        t.numel() for t in trained_state(applied(compose(lora={"rank": 2}))).values()
    )  # what rests is stored and counted too
    assert counts(model, set())["trained_params"] == sum(t.numel() for t in trained_state(model).values())


def test_alone_a_part_trains_what_its_paper_trains():
    model = applied(Doubled())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("parts", "words"),
    [({"lorra": {}}, "no method 'lorra'"), ({"lora": {"rnk": 2}}, "lora.rnk"), ({}, "empty")],
)
def test_wrong_parts_name_the_options(parts, words):
    with pytest.raises(ValueError, match=words):
        compose(**parts)


def test_two_optimizers_are_unsupported(monkeypatch):
    monkeypatch.setitem(METHODS, "doubled", Doubled)
    monkeypatch.setitem(METHODS, "again", type("Again", (Doubled,), {}))
    with pytest.raises(Unsupported, match="each bring an optimizer"):
        applied(compose(doubled={}, again={}))


def test_two_changes_of_the_same_weights_are_unsupported():
    with pytest.raises(Unsupported, match="no linear layer matches"):
        applied(compose(lora={}, dora={}))


def test_it_finishes_where_a_part_does():
    assert not compose(lora={}, bitfit={}).finishes
    assert compose(lora={}, prefix_tuning={}).finishes


# Schedules and optimizers of different papers on what one method trains

TOGETHER = [
    {"lora": {}, "lisa": {"layers": 1, "every": 2}},
    {"lora": {}, "ist": {"every": 2}},
    {"full_ft": {}, "galore": {"every": 3}},
    {"lora": {}, "galore": {"rank": 2}},
    {"dora": {}, "lora_plus": {}},
    {"adalora": {"rank": 2, "init_rank": 3, "interval": 1}, "lora_plus": {}},
    {"dylora": {}, "lora_plus": {}},
    {"qlora": {"rank": 4}, "lora_plus": {}},
    {"lora": {}, "mezo": {}},
    {"prefix_tuning": {"hidden": None}, "mezo": {"eps": 1e-1}},
    {"lora": {}, "lisa": {"layers": 1, "every": 2}, "lora_plus": {}},
    {"lora": {}, "lora_plus": {}, "ist": {"every": 2}},
    {"full_ft": {}, "lisa": {"layers": 1, "every": 2}, "galore": {"every": 3}},
    {"lora": {}, "ist": {"every": 2}, "galore": {"rank": 2}},
    {"lora": {}, "ist": {"every": 2}, "mezo": {}},
    {"sora": {}, "lisa": {"layers": 1, "every": 2}},
    {"adalora": {"rank": 2, "init_rank": 3, "interval": 1}, "ist": {"every": 2}},
]
together = pytest.mark.parametrize("parts", TOGETHER, ids=" ".join)


@together
def test_parts_train_together_and_go_on_where_they_stopped(tmp_path, parts):
    resumes_bit_for_bit(tmp_path, parts)


@together
def test_parts_move_what_is_awake_alone(parts):
    """Whoever brings the optimizer: in each step what rests stays to the bit, and something else moves."""
    loop = loop_of(parts, lr=1e-2)
    for i in range(4):
        before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
        loop.step([Batches()[i]])
        moved = {n for n, p in loop.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved and moved <= set(trained_state(loop.model))
        if {"lisa", "ist"} & set(parts):
            layers = {
                re.search(r"layer\.\d", n).group() for n in moved if ".layer." in n and not n.endswith(".E")
            }  # pruned
            assert len(layers) == 1  # of two


def test_a_schedule_drops_the_state_of_any_optimizer():
    loop = loop_of({"full_ft": {}, "lisa": {"layers": 1, "every": 2}, "galore": {"every": 3}}, steps=12)
    sizes = set()
    for i in range(12):
        loop.step([Batches()[i]])
        assert all(p.requires_grad for p in loop.optimizer.state)
        if i % 2 == 0:
            sizes.add(optimizer_bytes(loop.optimizer))
    assert len(sizes) == 1
    galore = loop_of({"full_ft": {}, "galore": {"every": 3}})
    galore.step([Batches()[0]])
    assert sizes.pop() < optimizer_bytes(galore.optimizer)


def test_the_rates_of_lora_plus_outlast_a_schedule():
    loop = loop_of({"lora": {}, "ist": {"every": 2}, "lora_plus": {"ratio": 4.0}})
    loop.step([Batches()[0]])
    assert loop.optimizer.param_groups[1]["lr"] == 4 * loop.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lora": {}, "lora_plus": {}, "galore": {}}, "each bring an optimizer"),
        ({"sora": {}, "mezo": {}}, "each bring an optimizer"),
        ({"lora": {}, "lisa": {"layers": 1}, "ist": {}}, "another method decides"),
        ({"increlora": {}, "ist": {}}, "another method decides"),
        ({"hft": {"rounds": 2}, "lisa": {"layers": 1}}, "another method decides"),
        ({"prefix_tuning": {}, "lisa": {"layers": 1}}, "share what is trained"),
        ({"compacter": {"reduction": 4, "layer_norm": False}, "ist": {}}, "share what is trained"),
        ({"prefix_tuning": {"hidden": None}, "ist": {}}, "adapters of layers"),
        ({"bitfit": {}, "galore": {}}, "gradients of matrices"),
        ({"vera": {}, "lora_plus": {}}, "factors called B"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_combined_says_why(parts, words):
    with pytest.raises(Unsupported, match=words):
        applied(compose(**parts))
