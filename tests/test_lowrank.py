"""The low-rank, structured and orthogonal methods: counts, parity from a non-zero state, and what each paper promises."""

import copy
import math
from unittest import mock

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import flops, saved_bytes
from bench.model import load_trained_state, trained_state, weights
from bench.random_models import random_model
from methods import METHODS, Adapted, Unsupported, nola
from methods.pissa import principal
from tests.test_methods import applied, batch_of, learn, logits, perturb
from tests.test_parity import TOLERANCE, doubled

NEW = ("lora_freeze_a", "lora_xs", "miss", "nola", "oft", "pissa", "svfit", "vera")
new = pytest.mark.parametrize("name", NEW)
kinds = pytest.mark.parametrize("kind", ["bert", "llama", "vit"])


def adapted(model) -> dict[str, Adapted]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapted)}


def one_layer(name: str, dtype: torch.dtype = torch.float32, **fields) -> Adapted:
    """The method on one linear layer of 32 inputs and 24 outputs, away from its start."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 24, dtype=dtype)).requires_grad_(False)
    METHODS[name](**fields, targets="0").apply(model, iter(()))
    perturb(model)
    return model[0]


# Parity with peft, from a state that is not the start

PEFT = {
    "lora_freeze_a": ("LORA", {"r": 8, "lora_alpha": 16}, {}),
    "pissa": ("LORA", {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}, {}),
    "lora_xs": (
        "PSOFT",
        {"r": 8, "psoft_alpha": 16, "psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False},
        {},
    ),
    "vera": ("VERA", {"r": 32, "d_initial": 0.1}, {}),
    "miss": ("MISS", {"r": 8}, {}),
    "miss of 5": ("MISS", {"r": 5}, {"rank": 5}),  # does not divide the 32 inputs
    "bat": ("MISS", {"r": 8, "init_weights": "bat"}, {"form": "bat"}),
    "oft": ("OFT", {"oft_block_size": 8, "use_cayley_neumann": False}, {"block": 8}),
    "oft, series": ("OFT", {"oft_block_size": 8}, {"block": 8, "terms": 5}),
}
METHOD_OF = {"miss of 5": "miss", "bat": "miss", "oft, series": "oft"}
SAME, FLIPPED, TURNED = (lambda t: t), (lambda t: -t), (lambda t: t.T)
PARAMETERS = {  # ours: peft's, and the isometry between them
    ("lora_freeze_a", "B"): ("lora_B.default.weight", SAME),
    ("pissa", "A"): ("lora_A.default.weight", SAME),
    ("pissa", "B"): ("lora_B.default.weight", SAME),
    ("lora_xs", "R"): ("psoft_R.default.weight", SAME),  # peft's is ours and the identity
    ("vera", "b"): ("vera_lambda_b.default", SAME),
    ("vera", "d"): ("vera_lambda_d.default", SAME),
    ("miss", "D"): ("miss_block.default", TURNED),
    ("miss of 5", "D"): ("miss_block.default", TURNED),
    ("bat", "B"): ("miss_block.default", SAME),
    ("oft", "q"): ("oft_R.default.weight", FLIPPED),  # peft's exact transform is the transpose of its own series
    ("oft, series", "q"): ("oft_R.default.weight", SAME),
}


@torch.no_grad()
def share_what_is_frozen(case: str, layer: Adapted, theirs) -> None:
    """The same frozen matrices on both sides: single precision made them, double precision compares."""
    if case == "lora_freeze_a":
        theirs.lora_A["default"].requires_grad_(False).weight.copy_(layer.A)
    elif case == "pissa":
        torch.testing.assert_close(theirs.get_base_layer().weight, layer.base.weight, rtol=1e-5, atol=1e-6)
        theirs.get_base_layer().weight.copy_(layer.base.weight)
    elif case == "lora_xs":
        theirs._psoft_A_cache["default"], theirs._psoft_B_cache["default"] = layer.A, layer.B
    elif case == "vera":
        layer.A.values.copy_(theirs.vera_A["default"][:, : layer.base.in_features])
        layer.B.values.copy_(theirs.vera_B["default"][: layer.base.out_features])


@kinds
@pytest.mark.parametrize("case", PEFT)
def test_agrees_with_peft(case, kind):
    pytest.importorskip("peft")
    type_, config, fields = PEFT[case]
    _, ours = applied(METHOD_OF.get(case, case), kind, **fields)
    perturb(ours, 0.2)
    other = METHODS["hf"](type=type_, config=config).apply(random_model(kind), iter(()))
    ours, other = ours.double(), other.double()
    found, pairs = dict(other.named_parameters()), []
    for name, layer in adapted(ours).items():
        share_what_is_frozen(case, layer, other.get_submodule(name).layer)
        for last, p in layer.named_parameters(recurse=False):
            if p.requires_grad:
                theirs, move = PARAMETERS[case, last]
                q = found[next(n for n in (f"{name}.layer.{theirs}", f"{name}.layer.oft_R.default") if n in found)]
                q.data.copy_(move(p).view_as(q) + (torch.eye(len(p)) if case == "lora_xs" else 0))
                pairs.append((p, q, move))
    for n, p in ours.named_parameters():
        if p.requires_grad and n in found:  # the head
            found[n].data.copy_(p)
            pairs.append((p, found[n], SAME))
    assert {id(p) for p, *_ in pairs} == {id(p) for p in ours.parameters() if p.requires_grad}
    assert {id(q) for _, q, _ in pairs} == {id(q) for q in other.parameters() if q.requires_grad}
    steps_agree(ours, other, pairs, doubled(kind))
    theirs = weights(other)
    for n, w in weights(ours).items():
        torch.testing.assert_close(w, theirs[n], rtol=1e-6, atol=1e-7)


def steps_agree(ours, other, pairs, batch) -> None:
    """Outputs, gradients, and the outputs after three steps of AdamW."""
    plain = logits(random_model(ours.config.model_type).double(), batch)
    assert (logits(ours, batch) - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), **TOLERANCE)
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], 1e-2, weight_decay=0.0) for i in (0, 1)]
    for _ in range(3):
        for model, optimizer in zip((ours, other), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
        for p, q, move in pairs:
            assert p.grad.abs().max() > 0
            torch.testing.assert_close(move(p.grad).view_as(q), q.grad, **TOLERANCE)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), rtol=1e-6, atol=1e-7)


# Parity with a dense closed form


def svfit_change(layer, p):
    W = layer.base.weight.detach()
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return sum((p["sigma"][i] - S[i].double()) * torch.outer(U[:, i].double(), Vh[i].double()) for i in range(len(S)))


def nola_change(layer, p):
    """Every basis at once."""
    shapes = {"a": layer.A0.shape, "b": (layer.base.out_features, len(layer.A0))}
    factors = {}
    for (which, (rows, columns)), seed in zip(shapes.items(), layer.seeds, strict=True):
        k = len(p[which])
        G = nola.numbers(seed, 0, k * rows * columns, p[which].device).view(k, rows, columns)
        factors[which] = torch.einsum("k,kij->ij", p[which], G.double()) / math.sqrt(k)
    return layer.scale * factors["b"] @ (layer.A0 + factors["a"])


@kinds
@pytest.mark.parametrize("name, change", [("svfit", svfit_change), ("nola", nola_change)])
def test_agrees_with_the_dense_closed_form(name, change, kind):
    _, ours = applied(name, kind)
    perturb(ours, 0.3)
    ours, base, batch = ours.double(), random_model(kind).double(), doubled(kind)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if p.requires_grad}
    layers = adapted(ours)
    own = {n: {k.rpartition(".")[2]: p for k, p in leaves.items() if k.startswith(f"{n}.")} for n in layers}

    class Dense(torch.nn.Module):
        config = base.config

        def forward(self, **batch):
            new = {f"{n}.weight": base.get_submodule(n).weight + change(layers[n], own[n]) for n in layers}
            head = {n: p for n, p in leaves.items() if n in dict(base.named_parameters())}
            return functional_call(base, new | head, kwargs=batch)

    found = dict(ours.named_parameters())
    for n, layer in layers.items():
        torch.testing.assert_close(layer.weight() - layer.base.weight, change(layer, own[n]), **TOLERANCE)
    steps_agree(ours, Dense(), [(found[n], p, SAME) for n, p in leaves.items()], batch)


# PiSSA


@pytest.mark.parametrize("iterations", [None, 8])
@kinds
def test_pissa_splits_every_weight(kind, iterations):
    pretrained = dict(random_model(kind).named_parameters())
    model = random_model(kind)
    held = dict(model.named_parameters())  # a snapshot that copies nothing
    torch.manual_seed(0)
    METHODS["pissa"](iterations=iterations).apply(model, iter(()))
    acting = weights(model)
    for name, layer in adapted(model).items():
        W = pretrained[f"{name}.weight"]
        assert torch.equal(held[f"{name}.weight"], W) and not torch.equal(layer.base.weight, W)
        torch.testing.assert_close(acting[name], W, rtol=0, atol=1e-6)
        if iterations is None:
            values = torch.linalg.svdvals(W)
            rest = torch.linalg.svdvals(layer.base.weight)[: len(values) - 8]
            torch.testing.assert_close(rest, values[8:], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(layer.A @ layer.A.T, torch.diag(values[:8]), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(layer.B.T @ layer.B, torch.diag(values[:8]), rtol=1e-4, atol=1e-6)


def test_pissa_at_another_scale_holds_the_same_part():
    assert METHODS["pissa"](rank=4).scale == 1
    base = torch.nn.Linear(12, 10)
    U, S, Vh = principal(base.weight, 4)
    layer = METHODS["pissa"](rank=4, alpha=16.0).layer(base)
    torch.testing.assert_close(4 * layer.B @ layer.A, U * S @ Vh)


def test_randomised_triplets_are_the_exact_ones_where_the_spectrum_falls():
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(40, 20))[0] * 2.0 ** -torch.arange(20) @ torch.linalg.qr(torch.randn(20, 20))[0]
    for exact, fast in zip(principal(W, 4), principal(W, 4, iterations=8), strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-3, atol=1e-4)  # signs too


@pytest.mark.parametrize("name", ["pissa", "lora_xs", "svfit", "lora_freeze_a"])
def test_the_sign_of_singular_vectors_is_no_choice_of_the_library(name, monkeypatch):
    """Another library's signs give the same layer, so that a stored adapter means the same there."""
    fields = {"start": "singular"} if name == "lora_freeze_a" else {}
    expected, svd = one_layer(name, rank=4, **fields), torch.linalg.svd

    def flipped(*args, **kwargs):
        U, S, Vh = svd(*args, **kwargs)
        signs = torch.tensor([1.0, -1.0]).repeat(len(S))[: len(S)]
        return U * signs, S, Vh * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    torch.testing.assert_close(one_layer(name, rank=4, **fields).weight(), expected.weight())


# Frozen A


@pytest.mark.parametrize("start", ["orthonormal", "kaiming", "singular"])
def test_a_frozen_a_stays_where_it_was_drawn(start):
    method, model = applied("lora_freeze_a", "bert", start=start)
    layers = adapted(model)
    before = {n: layer.A.clone() for n, layer in layers.items()}
    learn(method, model.train(), batch_of("bert"), 1e-2)
    for n, layer in layers.items():
        assert torch.equal(layer.A, before[n]) and layer.B.abs().max() > 0
        norms = torch.linalg.svdvals(layer.A)
        if start == "kaiming":
            assert layer.A.abs().max() <= 1 / math.sqrt(32) and norms.max() < 1
        else:
            torch.testing.assert_close(norms, torch.ones(8))
        if start == "singular":
            V = torch.linalg.svd(layer.base.weight)[2][:8]
            torch.testing.assert_close((layer.A @ V.T).abs(), torch.eye(8), rtol=0, atol=1e-5)


def test_frozen_factors_keep_no_input_for_the_backward_pass():
    x, rank = torch.randn(7, 32), 4
    inner = 7 * rank * 4  # bytes of A x
    kept = {
        name: saved_bytes(layer, lambda layer=layer: layer(x).sum())
        for name in ("lora", "lora_freeze_a", "lora_xs")
        for layer in [one_layer(name, rank=rank)]
    }
    assert kept == {"lora": inner + x.nbytes, "lora_freeze_a": inner, "lora_xs": inner}


# LoRA-XS and SVFit


def test_lora_xs_stays_within_the_leading_singular_subspaces():
    layer = one_layer("lora_xs", torch.float64, rank=6)
    W = layer.base.weight
    change = layer.weight() - W
    U, S, Vh = torch.linalg.svd(W)
    P, Q = U[:, :6] @ U[:, :6].T, Vh[:6].T @ Vh[:6]
    torch.testing.assert_close(P @ change @ Q, change)
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == 6
    U, S, Vh = principal(W, 6)
    expected = layer.scale * U @ layer.R @ torch.diag(S) @ Vh  # the singular values are on the side of the input
    torch.testing.assert_close(change, expected)


def test_svfit_has_no_intruder_dimension():
    layer = one_layer("svfit", torch.float64, rank=10)
    W = layer.base.weight
    before, after = torch.linalg.svd(W, full_matrices=False), torch.linalg.svd(layer.weight(), full_matrices=False)
    for old, new_ in ((before[0], after[0]), (before[2].T, after[2].T)):
        cosines = (new_.T @ old).abs().max(1).values
        assert cosines.min() > 1 - 1e-10
    assert (before[1] - after[1]).abs().max() > 1e-2
    torch.testing.assert_close(after[1].min(), before[1].min())  # beyond the rank nothing moves
    assert len(layer.sigma) == 10 and len(one_layer("svfit", rank=999).sigma) == 24


# What builds its weight for many rows


@pytest.mark.parametrize("name", ["svfit", "vera"])
def test_the_weight_is_built_where_that_is_cheaper(name):
    layer, g = one_layer(name, torch.float64, rank=24), torch.randn(400, 24, dtype=torch.float64)
    layer.base.bias.requires_grad_()
    cost, found = {}, {}
    for rebuilds in (True, False):
        x = torch.randn(400, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        assert layer.rebuilds(x, 24, x.dtype) and not layer.rebuilds(x[:20], 24, x.dtype)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        with mock.patch.object(type(layer), "rebuilds", lambda *_, rebuilds=rebuilds: rebuilds):
            found[rebuilds] = layer(x), *torch.autograd.grad(layer(x), wanted, g)
            cost[rebuilds] = flops(lambda x=x, wanted=wanted: torch.autograd.grad(layer(x), wanted, g))
    torch.testing.assert_close(found[True], found[False], **TOLERANCE)
    m, n, r = 24, 32, 24
    small = 4 * m * r if name == "vera" else 0  # the sums over each side
    assert cost[True] - cost[False] == 2 * (3 * r * m * n + 400 * m * n - 2 * 400 * r * (m + n)) + small < 0


# VeRA


def test_vera_shares_its_matrices_and_stores_none():
    _, model = applied("vera", "llama")
    for m in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        layers = adapted(m).values()
        assert len({layer.A.values.data_ptr() for layer in layers}) == 1  # one input width
        assert len({layer.B.values.data_ptr() for layer in layers}) == 2  # query, and the grouped value
        assert len({id(layer.A) for layer in layers}) == 1
    assert not any(".A." in n or ".B." in n for n in model.state_dict())
    bound = math.sqrt(6 / 32)
    assert bound * 0.95 < next(iter(layers)).A.values.abs().max() <= bound  # Kaiming uniform of fan-in 32


@pytest.mark.parametrize("name", ["lora_freeze_a", "vera", "nola"])
def test_only_the_same_seed_brings_the_frozen_matrices_back(name):
    _, model = applied(name, "bert", seed=3)
    perturb(model, 1.0)
    outputs = []
    for seed in (3, 4):
        _, fresh = applied(name, "bert", seed=seed)
        load_trained_state(fresh, trained_state(model))
        outputs.append(logits(fresh, batch_of("bert")))
    assert torch.equal(outputs[0], logits(model, batch_of("bert")))
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3


# NOLA


def test_nola_moves_b_first_and_then_both():
    method, model = applied("nola", "bert")
    model(**batch_of("bert")).loss.backward()
    layers = adapted(model).values()
    assert all(layer.b.grad.abs().min() > 0 and layer.a.grad.abs().max() == 0 for layer in layers)
    learn(method, model.train(), batch_of("bert"), 1e-2, steps=2)
    assert all(layer.a.grad.abs().max() > 0 for layer in layers)


def test_nola_draws_splitmix64():
    def output(seed: int, i: int) -> int:
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert [output(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]  # as widely published
    for seed in (0, 5, 2**62 - 1):
        halves = b"".join(output(seed, i).to_bytes(8, "little") for i in range(600))
        expected = torch.frombuffer(bytearray(halves), dtype=torch.int32).float() / 2**31
        for first, count in ((0, 1200), (10, 1000), (11, 1000), (7, 1)):
            drawn = nola.numbers(seed, first, count, torch.device("cpu"))
            assert torch.equal(drawn, expected[first : first + count])
        drawn = expected
        assert drawn.abs().mean() == pytest.approx(0.5, abs=0.03) and drawn.mean() == pytest.approx(0, abs=0.06)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_nola_never_holds_its_bases(monkeypatch):
    x = torch.randn(5, 32)
    few, many = (one_layer("nola", rank=4, bases_a=k, bases_b=k) for k in (8, 512))
    kept = [saved_bytes(layer, lambda layer=layer: layer(x).sum()) for layer in (few, many)]
    assert kept[0] == kept[1] <= 4 * (5 * 32 + 5 * 4 + 4 * 32 + 24 * 4)  # x, A x and the two factors
    results = []
    for at_once in (2**22, 1000):
        monkeypatch.setattr(nola, "AT_ONCE", at_once)
        many.zero_grad()
        state = torch.get_rng_state()
        with Largest() as largest:
            loss = many(x).square().sum()
            loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        results.append((loss.detach(), many.a.grad.clone(), many.b.grad.clone()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert largest.numel <= 1000 < 512 * 4 * 24


def test_nola_is_made_anew_to_the_bit():
    layer = one_layer("nola", bases_a=64, bases_b=64)
    assert torch.equal(layer.weight(), layer.weight()) and torch.equal(layer.weight(), copy.deepcopy(layer).weight())
    G = nola.numbers(layer.seeds[0], 0, 64 * 8 * 32, torch.device("cpu")).view(64, -1)
    assert torch.linalg.matrix_rank(G) == 64  # no basis twice
    assert layer.seeds[0] != layer.seeds[1]


# MiSS


@pytest.mark.parametrize("rank", [8, 5])
def test_miss_repeats_its_columns(rank):
    layer = one_layer("miss", rank=rank)
    change = layer.weight() - layer.base.weight
    for j in range(32):
        torch.testing.assert_close(change[:, j], layer.D[:, j % rank], rtol=0, atol=1e-6)


def test_bat_is_the_block_formula():
    layer = one_layer("miss", rank=8, form="bat")
    W, changed = layer.base.weight, layer.weight()
    for i in range(3):
        for j in range(4):
            block = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8)
            torch.testing.assert_close(changed[block], W[block] + W[block] @ layer.B[i] + layer.B[i])


# OFT


def test_oft_keeps_singular_values_and_left_vectors():
    layer = one_layer("oft", torch.float64, block=8)
    W, changed = layer.base.weight, layer.weight()
    assert (changed - W).abs().max() > 1e-2
    R = torch.block_diag(*layer.rotation())
    torch.testing.assert_close(R @ R.T, torch.eye(32, dtype=R.dtype))
    Q = torch.zeros(4, 8, 8, dtype=R.dtype)
    row, column = torch.triu_indices(8, 8, 1)
    Q[:, row, column] = layer.q
    Q = torch.block_diag(*(Q - Q.mT))
    eye = torch.eye(32, dtype=R.dtype)
    torch.testing.assert_close(R, (eye + Q) @ torch.linalg.inv(eye - Q))
    torch.testing.assert_close(changed, W @ R.T)
    before, after = torch.linalg.svd(W, full_matrices=False), torch.linalg.svd(changed, full_matrices=False)
    torch.testing.assert_close(after[1], before[1])
    torch.testing.assert_close((after[0].T @ before[0]).abs(), torch.eye(24, dtype=R.dtype), rtol=0, atol=1e-6)
    assert (after[2] @ before[2].T).abs().diag().min() < 0.999  # the right ones turn


def test_the_series_of_oft_is_orthogonal_only_nearly():
    exact, few, many = (one_layer("oft", block=8, terms=terms).double().rotation() for terms in (0, 5, 40))
    torch.testing.assert_close(many, exact, rtol=1e-6, atol=1e-8)
    off = (few @ few.mT - torch.eye(8)).abs().max()
    assert 1e-5 < off < 1e-1


# Errors


@pytest.mark.parametrize(
    "name, fields",
    [
        ("pissa", {"rank": 0}),
        ("pissa", {"iterations": -1}),
        ("lora_freeze_a", {"start": "gaussian"}),
        ("svfit", {"rank": 0}),
        ("vera", {"rank": 0}),
        ("nola", {"bases_b": 0}),
        ("miss", {"form": "bone"}),
        ("miss", {"rank": 0}),
        ("oft", {"block": 1}),
        ("oft", {"terms": 1}),
    ],
)
def test_wrong_fields_are_refused_with_the_way_out(name, fields):
    ((field, value),) = fields.items()
    with pytest.raises(ValueError, match=f"method.{field}={value!r}"):
        METHODS[name](**fields)


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("pissa", {"rank": 33}, "32 singular values"),
        ("lora_xs", {"rank": 33}, "32 singular values"),
        ("miss", {"rank": 33}, "no larger"),
        ("miss", {"rank": 5, "form": "bat"}, "divide both"),
        ("oft", {"block": 5}, "does not divide"),
    ],
)
def test_shapes_that_make_no_sense_are_unsupported(name, fields, words):
    with pytest.raises(Unsupported, match=words):
        METHODS[name](**fields).apply(random_model("bert"), iter(()))
