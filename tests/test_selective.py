"""Methods that train a part of the weights: which part, that the rest does not move, and what it saves."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

from bench.measure import optimizer_bytes, probe, saved_bytes
from bench.model import trained_state, weights
from bench.random_models import random_model
from methods import METHODS, Unsupported
from methods.hft import categories
from tests.test_methods import applied, batch_of, learn, perturb
from tests.test_parity import TOLERANCE, compare, doubled


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_ln_tuning_agrees_with_peft(kind):
    pytest.importorskip("peft")
    _, ours = applied("ln_tuning", kind)
    perturb(ours)
    other = METHODS["hf"](type="LN_TUNING").apply(random_model(kind), iter(()))
    ours, other = ours.double(), other.double()
    found, matched = dict(other.named_parameters()), {}
    for n, p in ours.named_parameters():
        if p.requires_grad:
            owner, _, last = n.rpartition(".")
            matched[p] = found[n if n in found else f"{owner}.ln_tuning_layers.default.{last}"]
            matched[p].data.copy_(p.data)
    assert len(matched) >= 5
    compare(ours, other, matched, doubled(kind))


def test_ln_tuning_changes_no_matrix():
    method, model = applied("ln_tuning", "bert")
    learn(method, model.train(), batch_of("bert"), 1e-2, steps=3)
    before, now = weights(random_model("bert")), weights(model)
    assert all(torch.equal(before[n], w) for n, w in now.items() if not n.startswith(("classifier", "bert.pooler")))


@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "gpt2", "t5", "deberta"])
def test_telly_freezes_embeddings_and_bottom_blocks(kind):
    _, model = applied("telly", kind, blocks=1)
    model(**batch_of(kind)).loss.backward()
    for n, p in model.named_parameters():
        bottom = r"encoder\.block\.0\." if kind == "t5" else r"(layers?|h)\.0\."
        assert p.requires_grad != bool(re.search(rf"embed|shared|wte|wpe|{bottom}", n)), n
        assert p.requires_grad or p.grad is None
    start = {n: p.clone() for n, p in model.named_parameters()}
    learn(METHODS["telly"](blocks=1), model, batch_of(kind), 1e-3, steps=2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}


def bert(layers: int) -> nn.Module:
    """A tiny BERT of that many layers, frozen."""
    import transformers

    config = copy.deepcopy(random_model("bert").config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).requires_grad_(False)


def test_telly_keeps_no_activation_of_frozen_blocks():
    """As many bytes as where everything below block K + 1 runs without autograd at all."""
    batch, kept = batch_of("bert"), []
    for blocks in range(4):
        model = METHODS["telly"](blocks=blocks).apply(bert(4), iter(()))
        kept.append(saved_bytes(model, lambda model=model: model(**batch).loss))
        below = [model.bert.embeddings, *model.bert.encoder.layer[:blocks]]
        for module in below:
            module.forward = torch.no_grad()(module.forward)
        assert saved_bytes(model, lambda model=model: model(**batch).loss) == kept[-1]
    steps = [a - b for a, b in itertools.pairwise(kept)]
    assert min(steps) == max(steps) > 8 * 10 * 32 * 4  # one block's activations each time


def test_telly_saves_the_optimizer_state_of_what_is_frozen():
    method = METHODS["telly"](blocks=3)
    model = method.apply(bert(4), iter(()))
    optimizer = method.optimizer(model, 1e-3, 0.0)
    model(**batch_of("bert")).loss.backward()
    optimizer.step()
    trained_numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 8 * trained_numbers <= optimizer_bytes(optimizer) < 8 * trained_numbers + 1000  # step counters


@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "gpt2", "t5", "deberta", "distilbert"])
def test_hft_freezes_half_of_every_category(kind):
    _, model = applied("hft", kind)
    ffn = []
    for attention, feed_forward, norm in categories(model):
        for layers in (attention, feed_forward, norm):
            assert len(layers) > 0
            on = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
            assert abs(sum(on) - len(on) / 2) <= 0.5
            assert all(p.requires_grad == on[i] for i, layer in enumerate(layers) for p in layer.parameters())
        ffn.append(sum(any(p.requires_grad for p in layer.parameters()) for layer in feed_forward))
    if kind == "llama":
        assert sorted(ffn) == [1, 2]  # of three matrices half of the blocks freeze one more


def test_hft_rounds_differ_and_what_rests_stays_to_the_bit():
    method, model = applied("hft", "bert", rounds=3)
    batch, steps = batch_of("bert"), 9
    optimizer, seen = method.optimizer(model, 1e-3, 0.1), []
    everything = {n: p.numel() for n, p in model.named_parameters()}
    assert {n: t.numel() for n, t in trained_state(model).items()} == everything
    for step in range(steps):
        resting = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        seen.append(frozenset(resting))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        for n, p in model.named_parameters():
            assert n not in resting or (torch.equal(p, resting[n]) and p not in optimizer.state)
        method.after_step(model, step, steps)
    assert [len(set(seen[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(seen)) == 3
    blocks = [p for n, p in model.named_parameters() if ".layer." in n]
    assert abs(sum(p.numel() for p in blocks if p.requires_grad) / sum(p.numel() for p in blocks) - 0.5) < 0.01
    assert 0.5 < method.numbers(model)["active_share"] < 0.9


def test_hft_goes_on_with_the_same_half():
    method, model = applied("hft", "bert", rounds=3)
    learn(method, model, batch_of("bert"), 1e-3, steps=5)
    other, fresh = applied("hft", "bert", seed=1, rounds=3)
    other.optimizer(fresh, 1e-3, 0.0)
    other.load_state(fresh, method.state(model))
    state = {n: (p.requires_grad, getattr(p, "resting", False)) for n, p in model.named_parameters()}
    assert {n: (p.requires_grad, getattr(p, "resting", False)) for n, p in fresh.named_parameters()} == state


def test_apet_counts_what_it_is_told():
    for count in (1, 777, 12_345, 16_000):
        _, model = applied("apet", "bert", parameters=count)
        values = [m for m in model.modules() if hasattr(m, "values") and hasattr(m, "index")]
        assert sum(m.values.numel() for m in values) == count
        assert all(len(m.index.unique()) == len(m.index) for m in values)
    with pytest.raises(Unsupported, match="entries of the target weights"):
        METHODS["apet"](parameters=10**6).apply(random_model("bert"), iter(()))


def support(model) -> torch.Tensor:
    parts = [(m.index, m.base.weight.numel()) for m in model.modules() if hasattr(m, "index")]
    return torch.cat([torch.zeros(n, dtype=torch.bool).index_fill(0, index, True) for index, n in parts])


@pytest.mark.parametrize("count", [1000, 12_000])
def test_apet_draws_uniformly(count):
    """Two seeds share K^2 / P entries, give or take the hypergeometric deviation; no layer is favoured."""
    masks = [support(applied("apet", "bert", seed=s, parameters=count)[1]) for s in range(8)]
    total = len(masks[0])
    share = count / total
    deviation = (count * share * (1 - share) * (total - count) / (total - 1)) ** 0.5
    overlaps = [int((a & b).sum()) for i, a in enumerate(masks) for b in masks[:i]]
    assert abs(sum(overlaps) / len(overlaps) - count * share) < 4 * deviation / len(overlaps) ** 0.5
    first = sum(int(m[: total // 4].sum()) for m in masks) / len(masks)
    assert abs(first - count / 4) < 5 * (count * 0.25 / len(masks)) ** 0.5
    assert torch.equal(masks[0], support(applied("apet", "bert", seed=0, parameters=count)[1]))


@pytest.mark.parametrize("kind, count", [("bert", 3000), ("bert", 300), ("llama", 3000), ("vit", 200)])
def test_apet_is_full_fine_tuning_under_a_mask(kind, count):
    """Three AdamW steps from a non-zero state, against dense weights whose gradients are masked."""
    _, ours = applied("apet", kind, parameters=count)
    perturb(ours)
    ours = ours.double()
    dense = random_model(kind).double()
    pairs = []
    for n, module in ours.named_modules():
        if hasattr(module, "index"):
            w = dense.get_submodule(n).weight.requires_grad_()
            w.data.copy_(module.weight().detach())
            pairs.append((module, w))
    for n, p in dense.named_parameters():
        if n in dict(ours.named_parameters()):
            p.data.copy_(dict(ours.named_parameters())[n].data)
    batch = doubled(kind)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2, weight_decay=0.0) for m in (ours, dense)
    ]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((ours, dense), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(model.train()(**batch).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, **TOLERANCE)
        for module, w in pairs:
            torch.testing.assert_close(module.values.grad, w.grad.flatten()[module.index], **TOLERANCE)
            mask = torch.zeros(w.numel(), dtype=torch.bool).index_fill(0, module.index, True).view_as(w)
            w.grad.mul_(mask)
        for optimizer in optimizers:
            optimizer.step()
    for module, w in pairs:
        torch.testing.assert_close(module.weight(), w, rtol=1e-6, atol=1e-7)


def test_apet_keeps_no_dense_matrix():
    _, model = applied("apet", "bert", parameters=3000)
    own = {p.data_ptr() for p in model.parameters()}
    shapes = {tuple(m.base.weight.shape) for m in model.modules() if hasattr(m, "index")}
    kept = []

    def pack(t):
        kept.append((tuple(t.shape), tuple(t.T.shape) if t.dim() == 2 else (), t.data_ptr() in own))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch_of("bert"))
    assert len(kept) > 20 and not [k for k in kept if not k[2] and (k[0] in shapes or k[1] in shapes)]


def test_apet_computes_of_a_gradient_what_it_needs():
    """Few entries cost a product of all rows each; where there are many, the whole gradient is computed."""
    steps, rows = {}, batch_of("bert")
    for count in (200, 400, 3000):
        _, model = applied("apet", "bert", parameters=count)
        steps[count] = probe(model, rows, lambda batch, model=model: model(**batch).loss)["train_step"]
    tokens = rows["input_ids"].numel()
    assert steps[400] - steps[200] == 2 * 200 * tokens
    weights = sum(m.base.weight.numel() for m in model.modules() if hasattr(m, "index"))
    assert steps[3000] - steps[200] == 2 * (weights - 200) * tokens


@pytest.mark.parametrize(
    "name, fields", [("telly", {"blocks": -1}), ("hft", {"rounds": 0}), ("apet", {"parameters": 0})]
)
def test_wrong_fields_are_refused(name, fields):
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        METHODS[name](**fields)


def test_telly_leaves_a_block_to_train():
    with pytest.raises(Unsupported, match="below 2"):
        METHODS["telly"](blocks=2).apply(random_model("bert"), iter(()))
