"""Prompts: counts, where they stand, what the head reads, agreement with `peft` and with models written out."""

import copy
import math

import pytest
import torch
from torch import nn

from bench.random_models import random_model
from methods import METHODS, Unsupported
from tests.test_methods import applied, batch_of, logits, perturb
from tests.test_parity import TOLERANCE, compare, doubled

VPT = ("vpt_shallow", "vpt_deep")


def vpt_by_hand(model: nn.Module, name: str) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """A plain ViT whose forward is written out with the prompts of `model`, and {our parameter: its}."""
    plain = random_model("vit").double()
    prompts = [layer.prompt.values for layer in model.vit.layers if hasattr(layer, "prompt")]
    matched = {p: nn.Parameter(p.detach().clone()) for p in prompts}
    own = list(matched.values())

    def forward(pixel_values, labels=None):
        vit = plain.vit
        x = vit.embeddings(pixel_values)
        first, patches = x[:, :1], x[:, 1:]
        middle = own[0].expand(len(x), -1, -1)
        for i, layer in enumerate(vit.layers):
            if name == "vpt_deep":
                middle = own[i].expand(len(x), -1, -1)
            x = layer(torch.cat([first, middle, patches], 1))
            p = middle.shape[1]
            first, middle, patches = x[:, :1], x[:, 1 : 1 + p], x[:, 1 + p :]
        found = plain.classifier(vit.layernorm(first)[:, 0])
        loss = nn.functional.cross_entropy(found, labels) if labels is not None else None
        return type("Output", (), {"logits": found, "loss": loss})

    plain.forward = forward
    for n, p in plain.named_parameters():
        if p.requires_grad:
            p.data.copy_(model.get_parameter(n).data)
            matched[model.get_parameter(n)] = p
    return plain, matched


@pytest.mark.parametrize("name", VPT)
def test_vpt_agrees_with_the_equations(name):
    _, ours = applied(name, "vit", length=3)
    perturb(ours, 0.5)
    other, matched = vpt_by_hand(ours.double(), name)
    batch = doubled("vit")
    assert (logits(ours, batch) - logits(random_model("vit").double(), batch)).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), **TOLERANCE)
    compare(ours, other, matched, batch)


def test_vpt_deep_with_one_layer_is_shallow():
    states = {}
    for name in VPT:
        torch.manual_seed(0)
        model = random_model("vit")
        model.vit.layers = model.vit.layers[:1]
        states[name] = logits(METHODS[name]().apply(model, iter(())), batch_of("vit"))
    torch.testing.assert_close(*states.values(), rtol=0, atol=0)


@pytest.mark.parametrize("name", VPT)
def test_the_head_sees_class_token_and_patches_alone(name):
    _, model = applied(name, "vit", length=7)
    lengths = []
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda m, x, y: lengths.append(y.shape[1]))
    hidden = model.vit(pixel_values=batch_of("vit")["pixel_values"]).last_hidden_state
    assert lengths == [1 + 7 + 4] * 2 and hidden.shape == (8, 1 + 4, 32)


@pytest.mark.parametrize("name", VPT)
def test_visual_prompts_start_uniform_and_survive_a_copy(name):
    _, model = applied(name, "vit", length=100)
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))
    for layer in model.vit.layers[: 1 if name == "vpt_shallow" else 2]:
        values = layer.prompt.values
        assert 0.98 * bound < values.max() <= bound and abs(values.std() - bound / math.sqrt(3)) < 0.01
    before, other = logits(model, batch_of("vit")), copy.deepcopy(model)
    perturb(model, 1.0)
    assert not torch.allclose(logits(model, batch_of("vit")), before, atol=1e-3)
    torch.testing.assert_close(logits(other, batch_of("vit")), before)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("name", VPT)
def test_visual_prompts_need_a_class_token_among_patches(name, kind):
    with pytest.raises(Unsupported, match="class token"):
        METHODS[name]().apply(random_model(kind), iter(()))


def prompted(kind: str, size: float = 0.5, **fields):
    _, model = applied("prompt_tuning", kind, **fields)
    perturb(model, size)
    return model.double(), next(m for m in model.modules() if hasattr(m, "prompt")).prompt


@pytest.mark.parametrize(
    "kind, task", [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("qwen2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_prompt_tuning_agrees_with_peft(kind, task):
    peft = pytest.importorskip("peft")
    ours, prompt = prompted(kind)
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type=task)
    other = peft.get_peft_model(random_model(kind), config).double()
    theirs = other.prompt_encoder["default"].embedding.weight
    theirs.data[:5] = prompt.values.data
    batch = doubled(kind)
    if kind != "t5":
        batch["labels"][:, 0] = -100  # peft's loss has the first token predicted from the prompt; no other method's has
    optimizers = [torch.optim.AdamW([p], 1e-2) for p in (prompt.values, theirs)]
    plain = logits(random_model(kind).double(), batch)
    assert (logits(ours, batch) - plain).abs().max() > 1e-2
    for _ in range(3):
        for model, optimizer in zip((ours, other), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
        assert (prompt.values.grad.abs().sum(1) > 0).all()  # gradient reaches every token of the prompt
        torch.testing.assert_close(prompt.values.grad, theirs.grad[:5], **TOLERANCE)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(prompt.values.data, theirs.data[:5], rtol=1e-6, atol=1e-7)
    actual, expected = logits(ours, batch), logits(other, batch)
    assert actual.shape[:2] == batch["labels"].shape  # the text's positions alone
    torch.testing.assert_close(actual, expected[:, -10:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_an_encoder_reads_cls_behind_the_prompt(kind):
    ours, prompt = prompted(kind)
    plain = random_model(kind).double()
    for n, p in plain.named_parameters():
        p.data.copy_(ours.get_parameter(n).data)
    batch = doubled(kind)
    embeds = plain.get_input_embeddings()(batch["input_ids"])
    embeds = torch.cat([prompt.values.expand(8, -1, -1), embeds], 1)
    mask = torch.cat([torch.ones(8, 5, dtype=torch.long), batch["attention_mask"]], 1)
    hidden = plain.base_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, 5:]
    if kind == "bert":
        expected = plain.classifier(plain.bert.pooler(hidden))
    elif kind == "roberta":
        expected = plain.classifier(hidden)
    else:
        expected = plain.classifier(plain.pre_classifier(hidden[:, 0]).relu())
    torch.testing.assert_close(ours(**batch).logits, expected, **TOLERANCE)
    sides = (torch.autograd.grad(y.square().sum(), prompt.values) for y in (ours(**batch).logits, expected))
    torch.testing.assert_close(*sides, **TOLERANCE)


def test_pairs_and_long_texts():
    model, _ = prompted("bert")
    batch = doubled("bert")
    types = torch.zeros_like(batch["input_ids"])
    torch.testing.assert_close(logits(model, batch | {"token_type_ids": types}), logits(model, batch), **TOLERANCE)
    assert not torch.equal(logits(model, batch | {"token_type_ids": types + 1}), logits(model, batch))
    ids = torch.full((1, 507), 7)
    assert logits(model, {"input_ids": ids}).shape == (1, 2)
    with pytest.raises(ValueError, match="5 prompt tokens and 508 of text are more than the 512"):
        model(input_ids=torch.full((1, 508), 7))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "t5"])
def test_a_prompted_model_generates_with_a_cache_as_without(kind):
    model, _ = prompted(kind, size=1.0)
    model.eval().generation_config.eos_token_id = None
    inputs = {n: t[:3] for n, t in doubled(kind).items() if n != "labels"}  # the first row is padded
    inputs = {n: t.flip(1) for n, t in inputs.items()}  # on the left
    fixed = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**inputs, **fixed)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **fixed))
    beams = [model.generate(**inputs, num_beams=3, use_cache=cache, **fixed) for cache in (True, False)]
    assert torch.equal(*beams)


def test_the_prompt_starts_as_tokens_or_at_random():
    _, model = applied("prompt_tuning", "llama", vocabulary=3)
    words, values = model.model.embed_tokens.weight, model.model.prompt.values
    assert all((words[:3] == row).all(1).any() for row in values)
    _, model = applied("prompt_tuning", "llama", start="random", length=100)
    assert 0.49 < model.model.prompt.values.max() <= 0.5 and -0.5 <= model.model.prompt.values.min() < -0.49


def test_a_copied_prompt_is_its_own():
    _, model = applied("prompt_tuning", "llama")
    before, other = logits(model, batch_of("llama")), copy.deepcopy(model)
    perturb(model, 1.0)
    assert not torch.allclose(logits(model, batch_of("llama")), before, atol=1e-3)
    torch.testing.assert_close(logits(other, batch_of("llama")), before)


@pytest.mark.parametrize("fields, word", [({"start": "zero"}, "zero"), ({"length": 0}, "length=0")])
def test_wrong_prompts_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        METHODS["prompt_tuning"](**fields)


def test_images_take_no_text_prompt():
    with pytest.raises(Unsupported, match="text"):
        METHODS["prompt_tuning"]().apply(random_model("vit"), iter(()))
