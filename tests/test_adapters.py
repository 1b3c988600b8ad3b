"""Adapters and side networks: counts, equations, what they share and what they keep for the backward pass."""

import copy
import itertools
import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from bench.measure import saved_bytes
from bench.model import trained_state
from bench.random_models import random_model
from methods import METHODS, Unsupported
from methods.architectures import role
from methods.compacter import CompacterLayer, LPHMLinear
from methods.pruned_start import fisher
from tests.test_methods import applied, batch_of, logits, perturb
from tests.test_parity import TOLERANCE, compare, doubled

WIDTH = 8


def adaptformer_by_hand(model: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """A plain ViT whose blocks are written out with the branch of equations 2 and 3, and {our parameter: its}."""
    plain, matched = random_model("vit").double(), {}
    for ours, theirs in zip(model.vit.layers, plain.vit.layers, strict=True):
        names = ("down", "down_bias", "up", "up_bias")
        own = [nn.Parameter(getattr(ours.mlp.adapter, n).detach().clone()) for n in names]
        matched |= {getattr(ours.mlp.adapter, n): p for n, p in zip(names, own, strict=True)}

        def forward(x, mask=None, block=theirs, own=own, **_):
            x = x + block.attention(block.layernorm_before(x))[0]
            down, down_bias, up, up_bias = own
            branch = 0.1 * (F.relu(x @ down.T + down_bias) @ up.T + up_bias)
            return x + block.mlp(block.layernorm_after(x)) + branch

        theirs.forward = forward
    for n, p in plain.named_parameters():
        if p.requires_grad:
            p.data.copy_(model.get_parameter(n).data)
            matched[model.get_parameter(n)] = p
    return plain, matched


def test_adaptformer_agrees_with_the_equations():
    _, ours = applied("adaptformer", "vit", width=WIDTH)
    perturb(ours, 0.3)
    other, matched = adaptformer_by_hand(ours.double())
    batch = doubled("vit")
    assert (logits(ours, batch) - logits(random_model("vit").double(), batch)).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), **TOLERANCE)
    compare(ours, other, matched, batch)


def test_adaptformer_survives_a_copy():
    """The hooks of a copied model lead to the copy's own adapters."""
    _, model = applied("adaptformer", "vit")
    perturb(model)
    before, other = logits(model, batch_of("vit")), copy.deepcopy(model)
    for layer in model.vit.layers:
        nn.init.zeros_(layer.mlp.adapter.up)
        nn.init.zeros_(layer.mlp.adapter.up_bias)
    assert not torch.allclose(logits(model, batch_of("vit")), before, atol=1e-4)
    torch.testing.assert_close(logits(other, batch_of("vit")), before)
    assert all(not layer.mlp.adapter.stream for layer in model.vit.layers)


def test_adaptformer_drops_out_in_training_alone():
    _, model = applied("adaptformer", "vit", dropout=0.5)
    perturb(model)
    batch = batch_of("vit")
    torch.testing.assert_close(logits(model, batch), logits(model, batch))
    assert not torch.allclose(model.train()(**batch).logits, model(**batch).logits, atol=1e-4)


def test_adaptformer_names_what_it_is_after_a_norm():
    with pytest.raises(Unsupported, match="parallel_adapter"):
        METHODS["adaptformer"]().apply(random_model("bert"), itertools.repeat(batch_of("bert")))


def t5_base() -> nn.Module:
    config = transformers.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config).requires_grad_(False)


@pytest.mark.parametrize(
    "fields, count",
    [
        ({"plus": True}, 104_704),  # .047 % of 222.9M
        ({}, 64 + 48 * 3 * (768 + 24) + 62 * 768),  # .073 %
        ({"plus": True, "layer_norm": False}, 64 + 24 * 2_376),
    ],
)
def test_compacter_counts(fields, count):
    model = METHODS["compacter"](**fields).apply(t5_base(), iter(()))
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == count


@pytest.mark.parametrize("plus, count", [(False, 784), (True, 424)])
def test_compacter_counts_of_the_adapters_package(plus, count):
    """The package `adapters` has these on a RoBERTa of three blocks, 32 wide."""
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=384
    )
    model = transformers.RobertaModel(config).requires_grad_(False)
    METHODS["compacter"](reduction=4, plus=plus, layer_norm=False).apply(model, iter(()))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def hypercomplex(x: torch.Tensor, A: torch.Tensor, layer: list[torch.Tensor]) -> torch.Tensor:
    """Equation 5 with the Kronecker products built."""
    s, t, bias = layer
    return x @ sum(torch.kron(a, torch.outer(u, v)) for a, u, v in zip(A, s, t, strict=True)) + bias


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_compacter_agrees_with_the_kronecker_products(kind, plus):
    _, ours = applied("compacter", kind, plus=plus)
    perturb(ours, 0.3)
    ours, other = ours.double(), random_model(kind).double()
    A = next(m.A for m in ours.modules() if isinstance(m, LPHMLinear))
    shared = nn.Parameter(A.detach().clone())
    matched = {A: shared}
    for name, module in ours.named_modules():
        if isinstance(module, CompacterLayer):
            halves = [[half.s, half.t, half.bias] for half in (module.adapter.down, module.adapter.up)]
            own = [[nn.Parameter(p.detach().clone()) for p in half] for half in halves]
            for half, copies in zip(halves, own, strict=True):
                matched |= dict(zip(half, copies, strict=True))

            def add(m, x, y, own=own):
                return y + hypercomplex(F.gelu(hypercomplex(y, shared, own[0])), shared, own[1])

            other.get_submodule(name).register_forward_hook(add)
    for n, p in other.named_parameters():
        mine = ours.get_parameter(n) if n in dict(ours.named_parameters()) else None
        if mine is not None and mine.requires_grad:
            p.data.copy_(mine.data)
            matched[mine] = p.requires_grad_()
    assert {id(p) for p in matched} == {id(p) for p in ours.parameters() if p.requires_grad}
    batch = doubled(kind)
    assert (logits(ours, batch) - logits(random_model(kind).double(), batch)).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), **TOLERANCE)
    compare(ours, other, matched, batch)


def test_compacter_shares_one_rule_through_copies_and_casts():
    _, model = applied("compacter", "bert")
    model = copy.deepcopy(model).double()
    layers = [m for m in model.modules() if isinstance(m, LPHMLinear)]
    assert len(layers) == 8 and len({id(m.A) for m in layers}) == 1
    assert sum(n.endswith(".A") for n in trained_state(model)) == 1
    assert 0.7e-4 < layers[0].A.std() < 1.4e-4 and all(not m.bias.any() for m in layers)
    s = layers[0].s  # (4, 8): Glorot with gain sqrt(2) is uniform within sqrt(2) sqrt(6 / (8 + 1))
    assert 0.8 * (12 / 9) ** 0.5 < s.abs().max() <= (12 / 9) ** 0.5


def test_compacter_needs_widths_that_n_divides():
    with pytest.raises(Unsupported, match="n=3"):
        METHODS["compacter"](n=3, reduction=4).apply(random_model("bert"), iter(()))
    with pytest.raises(ValueError, match="n=0"):
        METHODS["compacter"](n=0)


def ladder_by_hand(ours: nn.Module, kind: str) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """A plain model whose head reads a side network written out over its hidden states, and {our parameter: its}."""
    plain, seen = random_model(kind).double(), []
    ladder = ours.base_model.ladder
    copied = copy.deepcopy(ladder)
    matched = dict(zip(ladder.parameters(), copied.parameters(), strict=True))
    for n, p in plain.named_parameters():
        if p.requires_grad:
            p.data.copy_(ours.get_parameter(n).data)
            matched[ours.get_parameter(n)] = p
    layers = {"bert": "encoder.layer", "llama": "layers", "vit": "layers"}[kind]
    for i, layer in enumerate(plain.base_model.get_submodule(layers)):
        if i == 0:
            layer.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        layer.register_forward_hook(lambda m, x, kwargs, y: seen.append((y, x, kwargs)), with_kwargs=True)

    def side(*_):
        weights = [(p.weight, p.bias) for p in (copied.first, *copied.downs, copied.up)]
        h = F.linear(seen[0], *weights[0])
        for i, small in enumerate(copied.blocks):
            y, x, kwargs = seen[1 + i]
            mu = 1 / (1 + torch.exp(-copied.gates[i] / 0.1))
            h = mu * h + (1 - mu) * F.linear(y, *weights[1 + i])
            if kind == "llama":  # heads of 4 channels turn by angles of their own
                angles = torch.arange(10, dtype=torch.double)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.double)
                angles = torch.cat([angles, angles], 1)[None]
                kwargs = {
                    "attention_mask": kwargs["attention_mask"],
                    "position_embeddings": (angles.cos(), angles.sin()),
                }
            h = small(h, *x[1:], **kwargs)
        seen.clear()
        return F.linear(h if copied.norm is None else copied.norm(h), *weights[-1])

    if kind == "bert":
        end = plain.bert.encoder
        end.register_forward_hook(lambda m, x, y: type(y)(last_hidden_state=side()))
    else:
        (plain.model.norm if kind == "llama" else plain.vit.layernorm).register_forward_hook(side)
    return plain, matched


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_lst_agrees_with_a_side_network_written_out(kind):
    _, ours = applied("lst", kind)
    perturb(ours, 0.1)
    ours = ours.double()
    other, matched = ladder_by_hand(ours, kind)
    assert {id(p) for p in matched} == {id(p) for p in ours.parameters() if p.requires_grad}
    batch, tolerance = doubled(kind), {"rtol": 1e-5, "atol": 1e-6} if kind == "llama" else TOLERANCE
    optimizers = [torch.optim.SGD(ps, 0.1) for ps in (list(matched), list(matched.values()))]
    for _ in range(3):
        torch.testing.assert_close(
            logits(ours, batch), logits(other, batch), **tolerance
        )  # rotary angles are in float32
        for model, optimizer in zip((ours, other), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
        for p, q in matched.items():
            torch.testing.assert_close(p.grad, q.grad, **tolerance)
        for optimizer in optimizers:
            optimizer.step()


def t5_side(ladder, stack: nn.Module, mask: torch.Tensor, below: torch.Tensor | None, *inputs, **named) -> torch.Tensor:
    """h_s (rows, places, d / k) of one stack, written out over the hidden states of a plain one."""
    seen = []
    hooks = [stack.block[0].register_forward_pre_hook(lambda m, x: seen.append(x[0]))]
    hooks += [m.register_forward_hook(lambda m, x, y: seen.append(y[0])) for m in stack.block]
    stack(*inputs, **named)
    for hook in hooks:
        hook.remove()
    h, bias, cross = ladder.first(seen[0].detach()), None, None
    for gate, down, small, y in zip(ladder.gates, ladder.downs, ladder.blocks, seen[1:], strict=True):
        mu = 1 / (1 + torch.exp(-gate / 0.1))
        h = mu * h + (1 - mu) * down(y.detach())
        reads = {} if below is None else {"encoder_hidden_states": below, "encoder_decoder_position_bias": cross}
        h, bias, cross = small(h, mask, bias, **reads)
    return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ladder.norm.weight


def test_lst_agrees_with_the_side_encoder_and_decoder_of_t5_written_out():
    _, ours = applied("lst", "t5")
    perturb(ours, 0.3)
    ours, plain = ours.double(), random_model("t5").double()
    ladders = [s.ladder for s in (ours.encoder, ours.decoder)]
    copied = [copy.deepcopy(ladder) for ladder in ladders]
    batch = {n: t[1:] for n, t in doubled("t5").items()}  # without padding
    labels, start = batch["labels"], torch.zeros(7, 1, dtype=torch.long)
    wide = plain.encoder(batch["input_ids"]).last_hidden_state
    below = t5_side(copied[0], plain.encoder, None, None, batch["input_ids"])
    read = {"input_ids": torch.cat([start, labels[:, :-1]], 1), "encoder_hidden_states": wide}
    causal = torch.zeros(10, 10, dtype=torch.double).masked_fill(torch.ones(10, 10).triu(1).bool(), -1e30)[None, None]
    h = copied[1].up(t5_side(copied[1], plain.decoder, causal, below, **read))
    expected = plain.lm_head(h * 32**-0.5 if ours.config.tie_word_embeddings else h)
    torch.testing.assert_close(logits(ours, batch), expected, rtol=1e-5, atol=1e-6)  # position masks are in float32
    ours(**batch).loss.backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    for ladder, other in zip(ladders, copied, strict=True):
        assert not hasattr(ladder, "up") or ladder is ladders[1]
        for p, q in zip(ladder.parameters(), other.parameters(), strict=True):
            assert p.grad.abs().max() > 0
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "gpt2", "t5"])
def test_lst_keeps_nothing_of_the_backbone_but_what_the_ladders_read(kind):
    """No storage made inside a backbone layer is kept for the backward pass, and none has a gradient function."""
    _, model = applied("lst", kind)
    model.train()
    backbone, alive, read, kept = model.base_model, [], set(), set()
    pattern = re.compile(role(model, "layers"))
    layers = [m for n, m in backbone.named_modules() if pattern.search(n) and "ladder" not in n]
    assert len(layers) == (4 if kind == "t5" else 2)

    def watch(module, inputs, output):
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, torch.Tensor)]
        alive.extend(tensors)
        assert not any(t.requires_grad for t in tensors)
        if module in layers:
            read.add(tensors[0].untyped_storage().data_ptr())

    for layer in layers:
        for module in layer.modules():
            module.register_forward_hook(watch)

    def pack(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch_of(kind)).loss
    inside = {t.untyped_storage().data_ptr() for t in alive} - read
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    assert len(inside) > 10 and read <= kept and not kept & (inside | own)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lst_keeps_less_than_lora():
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=384
    )
    batch, found = batch_of("bert"), {}
    for name, fields in (("lst", {"fisher_samples": 8}), ("lora", {})):
        model = transformers.BertForSequenceClassification(config).requires_grad_(False)
        model = METHODS[name](**fields).apply(model, itertools.repeat(batch)).train()
        found[name] = saved_bytes(model, lambda model=model: model(**batch).loss)
    assert found["lst"] < 0.3 * found["lora"]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_ladder_generates_by_beams_with_a_cache_as_without(kind):
    _, model = applied("lst", kind)
    perturb(model, 0.3)
    model.eval().generation_config.eos_token_id = None
    ids, fixed = batch_of("llama")["input_ids"][1:4, :6], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ones = torch.ones_like(ids)
    beams = [model.generate(ids, attention_mask=ones, num_beams=3, use_cache=c, **fixed) for c in (True, False)]
    assert torch.equal(*beams)


def test_lst_drops_side_blocks_and_says_what_it_cannot_narrow():
    _, model = applied("lst", "bert", drop=2)
    assert model.bert.ladder.rungs == [1] and len(model.bert.ladder.blocks) == 1
    with pytest.raises(Unsupported, match="reduction=3 does not divide hidden_size=32"):
        METHODS["lst"](reduction=3).apply(random_model("bert"), iter(()))
    with pytest.raises(Unsupported, match="heads"):
        METHODS["lst"](reduction=8).apply(random_model("llama"), iter(()))
    with pytest.raises(ValueError, match="drop=1"):
        METHODS["lst"](drop=1)
    with pytest.raises(ValueError, match="fishy"):
        METHODS["lst"](start="fishy")


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "gpt2", "distilbert", "roberta", "t5"])
def test_side_blocks_pruned_by_nothing_are_the_backbone_blocks(kind):
    _, model = applied("lst", kind, reduction=1, start="magnitude")
    layers = [
        m for n, m in model.base_model.named_modules() if re.search(role(model, "layers"), n) and "ladder" not in n
    ]
    blocks = [block for m in model.modules() if hasattr(m, "ladder") for block in m.ladder.blocks]
    for layer, small in zip(layers, blocks, strict=True):
        state = small.state_dict()
        for n, tensor in layer.state_dict().items():
            torch.testing.assert_close(
                state[n].T if "c_" in n and state[n].dim() == 2 else state[n], tensor, rtol=0, atol=0
            )


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_side_blocks_start_from_what_is_large(kind):
    """Even channels of the stream, of heads and of the FFN are ten times larger in the backbone: they are kept."""
    model = random_model(kind)
    layers = [m for n, m in model.base_model.named_modules() if re.search(role(model, "layers"), n)]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, ::2] *= 10
        for module in [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]:
            module.weight[::2] *= 10
    model = METHODS["lst"](reduction=2, drop=0, start="magnitude").apply(model, iter(()))
    for layer, small in zip(layers, model.base_model.ladder.blocks, strict=True):
        for n, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                torch.testing.assert_close(small.get_submodule(n).weight, module.weight[::2, ::2], rtol=0, atol=0)


def test_fisher_information_is_the_sum_of_squared_gradients():
    model, batch = random_model("bert"), batch_of("bert")
    found = fisher(model, itertools.repeat(batch), 3)
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    other = random_model("bert").requires_grad_()
    weight, total = other.bert.encoder.layer[1].output.dense.weight, 0
    for i in range(3):
        other.zero_grad()
        other(**{n: t[i : i + 1] for n, t in batch.items()}).loss.backward()
        total = total + weight.grad**2
    torch.testing.assert_close(found[id(model.bert.encoder.layer[1].output.dense.weight)], total)
