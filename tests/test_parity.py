"""Methods against independent implementations, away from their start: `peft` where it has them, else plain tensors."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from bench.model import weights
from bench.random_models import random_model
from methods import METHODS
from tests.test_methods import applied, batch_of, logits, perturb

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # in double precision
LORA = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "magnitude": "lora_magnitude_vector.default.weight"}
LAYERS = {
    "lora": ({"type": "LORA", "config": {"r": 8, "lora_alpha": 16}}, {}),
    "rslora": ({"type": "LORA", "config": {"r": 8, "lora_alpha": 16, "use_rslora": True}}, {"rslora": True}),
    "dora": ({"type": "LORA", "config": {"r": 8, "lora_alpha": 16, "use_dora": True}}, {}),
    "ia3": ({"type": "IA3"}, {}),
}


def pair(name: str, kind: str):
    """Our model and peft's with the same trained values, and {our parameter: peft's}, in double precision."""
    theirs, fields = LAYERS[name]
    _, ours = applied("lora" if name == "rslora" else name, kind, **fields)
    perturb(ours)
    other = METHODS["hf"](**theirs).apply(random_model(kind), iter(()))
    ours, other = ours.double(), other.double()
    found = dict(other.named_parameters())
    matched = {}
    for n, p in ours.named_parameters():
        owner, _, last = n.rpartition(".")
        if p.requires_grad:
            peft_name = f"{owner}.layer.{LORA.get(last, 'ia3_l.default')}"
            matched[p] = found[n if n in found else peft_name]
            matched[p].data.copy_(p.data.view_as(matched[p]))
    return ours, other, matched


def compare(ours, other, matched, batch, other_batch=None) -> None:
    """Outputs, gradients and three AdamW steps agree."""
    other_batch = other_batch or batch
    optimizers = [torch.optim.AdamW(list(ps), 1e-2) for ps in (matched, matched.values())]
    for _ in range(3):
        for model, inputs, optimizer in ((ours, batch, optimizers[0]), (other, other_batch, optimizers[1])):
            optimizer.zero_grad()
            model.train()(**inputs).loss.backward()
        for p, q in matched.items():
            assert p.grad.abs().max() > 0
            torch.testing.assert_close(p.grad, q.grad.view_as(p), **TOLERANCE)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in matched.items():
        torch.testing.assert_close(p, q.view_as(p), rtol=1e-6, atol=1e-7)  # Adam divides by tiny gradients
    torch.testing.assert_close(logits(ours, batch), logits(other, other_batch), rtol=1e-6, atol=1e-7)


def doubled(kind: str) -> dict[str, torch.Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in batch_of(kind).items()}


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_peft(name, kind):
    pytest.importorskip("peft")
    ours, other, matched = pair(name, kind)
    batch = doubled(kind)
    plain = logits(random_model(kind).double(), batch)
    assert (logits(ours, batch) - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), **TOLERANCE)
    theirs = weights(other)
    for n, w in weights(ours).items():
        torch.testing.assert_close(w, theirs[n], **TOLERANCE)
    compare(ours, other, matched, batch)


@pytest.mark.parametrize("kind, hidden", [("llama", None), ("gpt2", None), ("gpt2", 16)])
def test_prefix_agrees_with_peft(kind, hidden):
    """In peft the text's positions start behind the prefix; ours are told to."""
    peft = pytest.importorskip("peft")
    _, ours = applied("prefix_tuning", kind, hidden=hidden, length=5)
    perturb(ours, 0.3)
    fields = {"prefix_projection": True, "encoder_hidden_size": 16} if hidden else {}
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", **fields)
    other = peft.get_peft_model(random_model(kind), config).double()
    ours, encoder = ours.double(), other.prompt_encoder["default"]
    prefixes = [m.prefix for m in ours.modules() if hasattr(m, "prefix")]
    copy_prefix(prefixes, encoder, hidden)
    batch = {n: t[1:] for n, t in batch_of(kind).items()}  # without padding, so that positions are one range
    moved = batch | {"position_ids": torch.arange(5, 15)[None].expand(7, -1)}
    sides = [(m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)) for m in (ours, other)]
    for _ in range(3):
        for (model, optimizer), inputs in zip(sides, (moved, batch), strict=True):
            optimizer.zero_grad()
            model.train()(**inputs).loss.backward()
        torch.testing.assert_close(logits(ours, moved), logits(other, batch), **TOLERANCE)
        same_prefix_gradients(prefixes, encoder, hidden)
        for _, optimizer in sides:
            optimizer.step()


def same_prefix_gradients(prefixes, encoder, hidden) -> None:
    if hidden is None:
        flat = torch.stack([p.values.grad for p in prefixes])  # layer, key or value, head, token, size
        torch.testing.assert_close(flat.permute(3, 0, 1, 2, 4).flatten(1), encoder.embedding.weight.grad, **TOLERANCE)
        return
    torch.testing.assert_close(prefixes[0].trunk.tokens.grad, encoder.embedding.weight.grad, **TOLERANCE)
    second = torch.cat([p.second.grad for p in prefixes])
    torch.testing.assert_close(second, encoder.transform[2].weight.grad, **TOLERANCE)


@torch.no_grad()
def copy_prefix(prefixes, encoder, hidden) -> None:
    if hidden is None:
        flat = torch.stack([p.values for p in prefixes])
        encoder.embedding.weight.copy_(flat.permute(3, 0, 1, 2, 4).flatten(1))
        return
    trunk, first, second = prefixes[0].trunk, encoder.transform[0], encoder.transform[2]
    encoder.embedding.weight.copy_(trunk.tokens)
    first.weight.copy_(trunk.first), first.bias.copy_(trunk.first_bias)
    second.weight.copy_(torch.cat([p.second for p in prefixes]))
    second.bias.copy_(torch.cat([p.second_bias for p in prefixes]))


def bottleneck(x, p, at: str, activation):
    """W_u f(W_d x + b_d) + b_u."""
    inner = activation(x @ p[f"{at}.adapter.down"].T + p[f"{at}.adapter.down_bias"])
    return inner @ p[f"{at}.adapter.up"].T + p[f"{at}.adapter.up_bias"]


def dense_bert(model, ids, name: str):
    """Logits of a two-layer BERT with `name`'s adapters, in plain tensor operations from the papers' equations."""
    p = {n.replace(".base.", "."): t for n, t in model.named_parameters()}

    def linear(x, at):
        return x @ p[f"{at}.weight"].T + p[f"{at}.bias"]

    def norm(x, at):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * p[f"{at}.weight"] + p[f"{at}.bias"]

    def heads(x):
        return x.view(*x.shape[:2], 4, 8).transpose(1, 2)

    e = "bert.embeddings"
    x = p[f"{e}.word_embeddings.weight"][ids] + p[f"{e}.token_type_embeddings.weight"][0]
    x = norm(x + p[f"{e}.position_embeddings.weight"][: ids.shape[1]], f"{e}.LayerNorm")
    for i in range(2):
        at = f"bert.encoder.layer.{i}"
        q, k, v = (heads(linear(x, f"{at}.attention.self.{n}")) for n in ("query", "key", "value"))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1) @ v
        h = linear(mixed.transpose(1, 2).flatten(2), f"{at}.attention.output.dense")
        if name == "houlsby":
            h = h + bottleneck(h, p, f"{at}.attention.output.dense", F.gelu)
        x = norm(h + x, f"{at}.attention.output.LayerNorm")
        h = linear(F.gelu(linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        if name == "houlsby":
            h = h + bottleneck(h, p, f"{at}.output.dense", F.gelu)
        if name == "pfeiffer":
            h = h + bottleneck(norm(h + x, f"{at}.output.LayerNorm"), p, f"{at}.output.LayerNorm", F.relu)
        if name == "parallel_adapter":
            h = h + 4.0 * bottleneck(x, p, f"{at}.output", F.relu)
        x = norm(h + x, f"{at}.output.LayerNorm")
    return linear(torch.tanh(linear(x[:, 0], "bert.pooler.dense")), "classifier")


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel_adapter"])
def test_adapters_agree_with_the_equations(name):
    _, model = applied(name, "bert")
    perturb(model, 0.2)
    model = model.double()
    ids = batch_of("bert")["input_ids"]
    actual, expected = model(input_ids=ids).logits, dense_bert(model, ids, name)
    assert (actual - logits(random_model("bert").double(), {"input_ids": ids})).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    trained = [p for p in model.parameters() if p.requires_grad]
    sides = [torch.autograd.grad(y.square().sum(), trained, retain_graph=True) for y in (actual, expected)]
    torch.testing.assert_close(*sides, **TOLERANCE)
    after_steps = []
    for forward in (lambda m: m(input_ids=ids).logits, lambda m: dense_bert(m, ids, name)):
        other = copy.deepcopy(model)
        optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            forward(other).square().sum().backward()
            optimizer.step()
        after_steps.append(logits(other, {"input_ids": ids}))
    assert (after_steps[0] - actual).abs().max() > 1e-3
    torch.testing.assert_close(*after_steps, rtol=1e-6, atol=1e-7)


def test_bitfit_trains_the_biases_by_hand():
    _, ours = applied("bitfit", "bert")
    other = copy.deepcopy(random_model("bert"))
    for n, p in other.named_parameters():
        p.requires_grad_(n.endswith("bias") or n.startswith("classifier"))
    matched = {p: q for p, q in zip(ours.parameters(), other.parameters(), strict=True) if q.requires_grad}
    assert {id(p) for p in matched} == {id(p) for p in ours.parameters() if p.requires_grad}
    compare(ours, other, matched, batch_of("bert"))
