"""How far a step is above the floor of its frozen backbone: bytes and FLOPs, counted."""

from __future__ import annotations

import pytest
import torch

from bench.random_models import random_model
from benchmarks.floor import counted, floor
from methods import METHODS
from methods.base import Adapted

ROWS, TOKENS, RANK = 4, 24, 3


def batch():
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 300 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(ROWS) % 2}


def inputs_and_products(model):
    """Bytes of the inputs of all adapted layers, each tensor once, and of the products with A."""
    seen = {}

    def note(module, given, out):
        storage = given[0].untyped_storage()
        seen[storage.data_ptr()] = given[0], storage.nbytes()

    layers = [m for m in model.modules() if isinstance(m, Adapted)]
    hooks = [m.register_forward_hook(note) for m in layers]
    model(**batch())
    for hook in hooks:
        hook.remove()
    return sum(size for _, size in seen.values()), len(layers) * ROWS * TOKENS * RANK * 4


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("targets", ["query_value", "all_linear"])
def test_lora_keeps_the_input_of_each_adapted_layer_once_and_a_rank_r_product(kind, targets):
    model_class = "AutoModelForSequenceClassification"
    below = floor(random_model(kind, model_class=model_class), batch())
    model = random_model(kind, model_class=model_class)
    method = METHODS["lora"](rank=RANK, targets=targets)
    model = method.apply(model, iter(()))
    inputs, products = inputs_and_products(model)
    found = counted(model, batch(), method)
    assert below["activations"] < found["activations"] <= below["activations"] + inputs + products
    assert found["forward"] > below["forward"]


def test_full_fine_tuning_is_the_floor_and_the_gradients_of_its_weights():
    model, rows = random_model("bert"), batch()
    low = floor(model, rows)
    full = counted(METHODS["full_ft"]().apply(random_model("bert"), iter(())), rows)
    matrices = {
        n: p for n, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in n and not p.requires_grad
    }
    inputs = {name: ROWS if "pooler" in name else ROWS * TOKENS for name in matrices}
    assert full["train_step"] - low["train_step"] == sum(2 * inputs[n] * p.numel() for n, p in matrices.items())
    assert full["forward"] == low["forward"] and low["activations"] < full["activations"]
    assert not hasattr(model.get_input_embeddings(), "shift")


def test_what_trains_above_all_layers_is_below_the_floor():
    low = floor(random_model("bert"), batch())
    probe = METHODS["linear_probe"]()
    found = counted(probe.apply(random_model("bert"), iter(())), batch(), probe)
    assert found["activations"] < 0.1 * low["activations"] and found["train_step"] < 1.1 * low["forward"]
