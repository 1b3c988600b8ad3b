"""Every registered method keeps the same promises, on every kind of model."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch

from bench.model import load_trained_state, merge, trained_state, weights
from bench.random_models import random_model
from methods import METHODS, Adapted, Unsupported

KINDS = ("bert", "llama", "vit")
OTHERS = ("roberta", "deberta", "distilbert", "gpt2", "qwen2", "phi3", "t5", "deit")
IMAGES, TEXTS = ("vit", "deit"), ("llama", "qwen2", "phi3", "gpt2", "t5")
SMALL = {"parallel_adapter": {"width": 8}, "prefix_tuning": {"hidden": 16}, "houlsby": {"width": 8}}  # for speed only
LR = {"full_ft": 1e-3, "prefix_tuning": 3e-2, "bitfit": 3e-2, "ia3": 3e-2, "linear_probe": 3e-2}
STEPS = 12
EXACT_START = {"houlsby": {"init_std": 0.0}, "pfeiffer": {"init_std": 0.0}, "hf": {}}  # nearly neutral ones
SMALL |= {"adaptformer": {"dropout": 0.0}, "compacter": {"reduction": 4}, "prompt_tuning": {"length": 5}}
SMALL |= {"lst": {"reduction": 2, "drop": 0, "fisher_samples": 4}}
SMALL |= {"telly": {"blocks": 1}}  # of two
LR |= {"ln_tuning": 3e-2, "telly": 1e-3, "hft": 1e-3}
FROM_SEED = {"apet", "hft"}  # what is frozen is drawn from the seed: only the same one rebuilds the model
SMALL |= {"lora_xs": {"rank": 8}, "miss": {"rank": 8}, "vera": {"rank": 32}, "nola": {"bases_a": 32, "bases_b": 32}}
EXACT_START |= {"lora_xs": {"init_std": 0.0}}
FROM_SEED |= {"lora_freeze_a", "vera", "nola"}
LR |= {"vpt_shallow": 0.1, "vpt_deep": 0.03, "prompt_tuning": 0.1}
SMALL |= {"lisa": {"layers": 1, "every": 2}, "ist": {"every": 3}}  # so that they draw and score
SMALL |= {"qlora": {"rank": 8, "dropout": 0.0}}
SMALL |= {"mezo": {"eps": 1e-4}}  # its losses are those at a distance of eps
LR |= {"galore": 1e-3, "lisa": 1e-3, "mezo": 3e-3}
SMALL |= {"adalora": {"rank": 2, "init_rank": 3, "interval": 1}}
SMALL |= {"increlora": {"orthogonal": 0.0}}  # its penalty grows with the ranks
EXACT_START |= {"increlora": {"reserve": 0.0}}
EXACT_START |= {"ssf": {"init_std": 0.0}, "compacter": {"init_std": 0.0}}


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind in IMAGES:
        x = torch.randn(8, 3, 16, 16, generator=generator)
        return {"pixel_values": x, "labels": (x.mean((1, 2, 3)) > 0).long()}
    ids = torch.randint(3, 384, (8, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    if kind in TEXTS:
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {"input_ids": ids, "attention_mask": mask, "labels": (ids[:, 1] > 190).long()}


def make(name: str, **fields):
    return METHODS[name](**(SMALL.get(name, {}) | fields))


def applied(name: str, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields):
    """The method and the model it was applied to; the test is skipped where the method has no meaning."""
    torch.manual_seed(seed)
    method = make(name, **fields)
    try:
        return method, method.apply(random_model(kind).to(dtype), itertools.repeat(batch_of(kind)))
    except Unsupported as reason:
        assert len(str(reason)) > 20
        pytest.skip(str(reason))


def perturb(model: torch.nn.Module, size: float = 0.05) -> None:
    """Move every trained parameter away from its start, so that no promise holds for want of a change."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=size)


def learn(method, model, batch, lr: float, steps: int = STEPS) -> list[float]:
    optimizer, losses = method.optimizer(model, lr, 0.0), []

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).loss + method.penalty(model)
        if torch.is_grad_enabled():
            loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for step in range(steps):
        optimizer.step(torch.enable_grad()(closure))
        method.after_step(model, step, steps)
    return losses


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


names = pytest.mark.parametrize("name", sorted(n for n, method in METHODS.items() if not method.untrained))
kinds = pytest.mark.parametrize("kind", KINDS)


@names
@kinds
def test_learns_and_touches_nothing_frozen(name, kind):
    method, model = applied(name, kind)
    batch = batch_of(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = set(trained_state(model))
    losses = learn(method, model.train(), batch, LR.get(name, 1e-2))
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    ids = {id(p) for n, p in model.named_parameters() if n in trained}
    for n, t in before.items():
        assert id(now[n]) in ids or torch.equal(t, now[n]), f"{n} is frozen, yet it changed"


@names
@kinds
def test_every_trained_parameter_gets_a_gradient(name, kind):
    _, model = applied(name, kind)
    perturb(model)
    model(**batch_of(kind)).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all("embeddings" in n or "embed" in n or "pooler" in n for n in dead), dead
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@names
@kinds
def test_starts_as_the_pretrained_model(name, kind):
    if not METHODS[name].neutral and name not in EXACT_START:
        pytest.skip("declared: does not start as the pretrained model")
    batch = batch_of(kind)
    expected = logits(random_model(kind), batch)
    _, model = applied(name, kind, **EXACT_START.get(name, {}))
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@names
@kinds
def test_merging_keeps_the_function(name, kind, dtype, tolerance):
    torch.manual_seed(0)
    base, batch = random_model(kind).to(dtype), batch_of(kind)
    if kind == "vit":
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    try:
        model = make(name).apply(base, itertools.repeat(batch))
    except Unsupported as reason:
        pytest.skip(str(reason))
    start = logits(model, batch)
    perturb(model)
    acting, expected = weights(model), logits(model, batch)
    assert expected.dtype == dtype and (expected - start).abs().max() > 1e-3
    merge(model)
    assert not any(isinstance(m, Adapted) and m.weight() is not None for m in model.modules())
    torch.testing.assert_close(logits(model, batch), expected, rtol=tolerance, atol=tolerance)
    for n, w in acting.items():
        torch.testing.assert_close(weights(model)[n], w.to(dtype))


@names
def test_merging_leaves_the_pretrained_shape_where_the_table_says_so(name):
    if name in ("hf", "compose"):
        pytest.skip("depends on the tuner or the parts")
    for kind in KINDS:
        try:
            model = make(name).apply(random_model(kind), itertools.repeat(batch_of(kind)))
        except Unsupported:
            continue
        merge(model)
        same = {n for n, _ in model.named_parameters()} == {n for n, _ in random_model(kind).named_parameters()}
        assert same == METHODS[name].mergeable, kind


@names
@kinds
def test_new_parameters_are_kept_in_single_precision(name, kind):
    base = random_model(kind).bfloat16()
    old = {id(p) for p in base.parameters()}
    try:
        model = make(name).apply(base, itertools.repeat(batch_of(kind)))
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert {p.dtype for p in model.parameters() if p.requires_grad and id(p) not in old} <= {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@names
@kinds
def test_trained_state_is_the_whole_checkpoint(name, kind, dtype):
    batch = batch_of(kind)
    method, model = applied(name, kind, dtype=dtype)
    perturb(model)
    before = logits(model, batch)
    method.finish(model)
    torch.testing.assert_close(logits(model, batch), before)
    other, fresh = applied(name, kind, seed=0 if name in FROM_SEED else 1, dtype=dtype)
    other.finish(fresh)
    load_trained_state(fresh, trained_state(model))
    torch.testing.assert_close(logits(fresh, batch), before)
    torch.testing.assert_close(logits(copy.deepcopy(model), batch), before)


@names
@pytest.mark.parametrize("kind", OTHERS)
def test_works_on_other_architectures(name, kind):
    method, model = applied(name, kind)
    steps = 4 if method.backward else 20  # a random direction descends slowly
    losses = learn(method, model.train(), batch_of(kind), LR.get(name, 1e-2) / 3, steps)
    assert losses[-1] < losses[0]


@names
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_generation_ignores_the_cache_and_left_padding(name, kind):
    _, model = applied(name, kind)
    perturb(model)
    model.eval().generation_config.eos_token_id = None
    ids = batch_of(kind)["input_ids"][1:3, :6]
    ones, fixed = torch.ones_like(ids), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=ones, **fixed)
    greedy = ids
    with torch.no_grad():
        for _ in range(5):
            last = model(input_ids=greedy, use_cache=False).logits[:, -1]
            greedy = torch.cat([greedy, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, greedy)
    pad = torch.zeros(2, 3, dtype=ids.dtype)
    padded = model.generate(input_ids=torch.cat([pad, ids], 1), attention_mask=torch.cat([pad, ones], 1), **fixed)
    assert torch.equal(padded[:, 3:], cached)


@names
def test_padding_does_not_change_an_encoder(name):
    _, model = applied(name, "bert")
    perturb(model)
    ids, pad = batch_of("bert")["input_ids"][:, :6], torch.zeros(8, 4, dtype=torch.long)
    alone = logits(model, {"input_ids": ids})
    mask = torch.cat([torch.ones_like(ids), pad], 1)
    together = logits(model, {"input_ids": torch.cat([ids, pad + 5], 1), "attention_mask": mask})
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@names
@kinds
def test_gradient_checkpointing_changes_nothing(name, kind):
    """Also where what enters the blocks has no gradient, as under most methods."""
    _, model = applied(name, kind)
    perturb(model)
    batch, grads = batch_of(kind), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(**batch).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads)


@names
def test_is_documented(name):
    cls = METHODS[name]
    first = sys.modules[cls.__module__].__doc__
    assert "arxiv.org/abs/" in first or name in ("hf", "compose")
    assert cls.__doc__ and cls.family and 0 < cls.lr < 1


def test_importing_the_methods_imports_no_heavy_library():
    code = "import sys, methods; print({'transformers', 'peft', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    "name, fields", [("lora", {"bias": "some"}), ("lora", {"rank": 0}), ("bitfit", {"biases": "few"}),
                     ("houlsby", {"activation": "tanhh"}), ("prefix_tuning", {"length": 0})]
)  # fmt: skip
def test_wrong_fields_are_refused_with_the_way_out(name, fields):
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        METHODS[name](**fields)


def test_unknown_targets_name_the_layers_that_exist():
    with pytest.raises(Unsupported, match="query"):
        METHODS["lora"](targets="nothing_like_it").apply(random_model("bert"), iter(()))
