"""Optimizers as methods: their updates against closed forms, what they hold, how they compose, and their resumption."""

import math

import pytest
import torch

from bench import checkpoint
from bench.config import TrainConfig
from bench.measure import optimizer_bytes
from bench.model import trained_state
from bench.random_models import random_model
from bench.train import Loop
from methods import METHODS, Unsupported
from methods.galore import GaLoreAdamW
from methods.mezo import MeZOSGD
from tests.test_counts import build
from tests.test_methods import batch_of, perturb
from tests.test_parity import TOLERANCE, doubled
from tests.test_train import Batches

CPU = torch.device("cpu")


def method_of(parts):
    """`parts` is a method's fields by its name; several are composed."""
    names = list(parts)
    return METHODS[names[0]](**parts[names[0]]) if len(names) == 1 else METHODS["compose"](parts=parts)


def loop_of(parts, kind="bert", *, steps=10, dropout=0.1, **options):
    torch.manual_seed(0)
    model = random_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    method = method_of(parts)
    model = method.apply(model, iter(()))
    return Loop(model, method, TrainConfig(**{"lr": 1e-3} | options), steps=steps, device=CPU)


def resumes_bit_for_bit(tmp_path, parts, cut=5, **options):
    """A training that is stopped after `cut` of 10 steps and taken up by a fresh process ends as one that was not."""
    whole, first, second = (loop_of(parts, **options) for _ in range(3))
    torch.manual_seed(1)
    losses = [whole.step([Batches()[i]]) for i in range(10)]
    torch.manual_seed(1)
    assert [first.step([Batches()[i]]) for i in range(cut)] == losses[:cut]
    checkpoint.save(tmp_path / "checkpoint.safetensors", first, {})
    torch.manual_seed(99)
    checkpoint.load(tmp_path / "checkpoint.safetensors", second)
    assert [second.step([Batches()[i]]) for i in range(cut, 10)] == losses[cut:]
    ends = trained_state(whole.model), trained_state(second.model)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    states = whole.method.state(whole.model), second.method.state(second.model)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in whole.model.named_parameters()} == {
        n: p.requires_grad for n, p in second.model.named_parameters()
    }
    assert optimizer_bytes(whole.optimizer) == optimizer_bytes(second.optimizer)


@pytest.mark.parametrize("parts", [
    {"lora_plus": {}}, {"dora": {}, "lora_plus": {"ratio": 4.0}},
    {"galore": {"every": 3}}, {"lora": {}, "galore": {"every": 3, "rank": 2}},
    {"mezo": {}}, {"lora": {}, "mezo": {}}, {"prefix_tuning": {"hidden": 8}, "mezo": {"eps": 1e-2}},
], ids=" ".join)  # fmt: skip
def test_resumes_bit_for_bit(tmp_path, parts):
    resumes_bit_for_bit(tmp_path, parts)


# LoRA+


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_agrees_with_peft(ratio):
    """Three steps from a non-zero state, on a decoder, which has no head (peft gives vectors the larger rate as well)."""
    pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    torch.manual_seed(0)
    method = METHODS["lora_plus"](ratio=ratio)
    ours = method.apply(random_model("llama"), iter(()))
    perturb(ours)
    ours = ours.double()
    theirs = METHODS["hf"](type="LORA", config={"r": 8, "lora_alpha": 16}).apply(random_model("llama"), iter(()))
    theirs = theirs.double()
    found = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    pairs = {}
    for n, p in ours.named_parameters():
        if p.requires_grad:
            owner, _, last = n.rpartition(".")
            pairs[p] = found[f"{owner}.layer.{names[last]}"]
            pairs[p].data.copy_(p.data)
    optimizers = [method.optimizer(ours, 1e-3, 0.1)]
    options = {"lr": 1e-3, "loraplus_lr_ratio": ratio, "loraplus_weight_decay": 0.1}
    optimizers += [create_loraplus_optimizer(theirs, torch.optim.AdamW, **options)]
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(**doubled("llama")).loss.backward()
            optimizer.step()
    assert all((p - start[n]).abs().max() > 1e-4 for n, p in ours.named_parameters() if p.requires_grad)
    for p, q in pairs.items():
        torch.testing.assert_close(p, q, **TOLERANCE)


def test_lora_plus_has_two_rates_and_the_schedule_keeps_their_ratio():
    loop = loop_of({"dora": {"rank": 2}, "lora_plus": {}}, lr=1e-3, schedule="linear", warmup=0.5)
    for i in range(10):
        rates = [group["lr"] for group in loop.optimizer.param_groups]
        assert rates[1] == pytest.approx(16 * rates[0])
        loop.step([Batches()[i]])
    b = {id(p) for n, p in loop.model.named_parameters() if n.endswith(".B")}
    assert {id(p) for p in loop.optimizer.param_groups[1]["params"]} == b
    held = sum(len(group["params"]) for group in loop.optimizer.param_groups)
    assert held == len(trained_state(loop.model))


def test_lora_plus_at_ratio_one_is_lora():
    ends = []
    for parts in ({"lora": {}}, {"lora_plus": {"ratio": 1.0}}):
        loop = loop_of(parts)
        for i in range(3):
            loop.step([Batches()[i]])
        ends.append(trained_state(loop.model))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


# GaLore


def galore_closed_form(w, grads, *, rank, every, scale, lr, decay):
    """The published update of one weight, written out: Adam of the projected gradients, moments kept over refreshes.

    rank: None for a weight that is not projected.
    """
    wide = w.shape[0] < w.shape[1]
    m = v = 0.0
    for t, g in enumerate(grads):
        if rank and t % every == 0:
            u, _, vt = torch.linalg.svd(g, full_matrices=False)
            p = u[:, :rank] if wide else vt[:rank]
        r = g if not rank else p.T @ g if wide else g @ p.T
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        n = m / (v.sqrt() + 1e-6)
        n = n if not rank else scale * (p @ n if wide else n @ p)
        w = w - lr * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1)) * n
        w = w - lr * decay * w
    return w


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("rank", [2, 9, None])
def test_galore_is_the_published_update(shape, rank):
    torch.manual_seed(0)
    start, grads = torch.randn(shape).double(), [torch.randn(shape).double() for _ in range(7)]
    p = torch.nn.Parameter(start.clone())
    projected = {"rank": rank, "every": 3, "scale": 4.0} if rank else {}
    optimizer = GaLoreAdamW([{"params": [p]} | projected], {"lr": 1e-2, "weight_decay": 0.1})
    for g in grads:
        p.grad = g.clone()
        optimizer.step(lambda: torch.zeros(()))
    expected = galore_closed_form(start, grads, rank=rank, every=3, scale=4.0, lr=1e-2, decay=0.1)
    assert (expected - start).abs().max() > 0.03
    torch.testing.assert_close(p.detach(), expected, **TOLERANCE)


def test_galore_agrees_with_the_authors_package():
    package = pytest.importorskip("galore_torch.adamw")
    torch.manual_seed(0)
    start, grads = torch.randn(7, 5), [torch.randn(7, 5) for _ in range(7)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    group = {"rank": 2, "scale": 4.0}
    optimizers = [
        GaLoreAdamW([{"params": [ours], "every": 3} | group], {"lr": 1e-2, "weight_decay": 0.1}),
        package.AdamW([{"params": [theirs], "update_proj_gap": 3, "proj_type": "std"} | group], 1e-2, weight_decay=0.1),
    ]
    for g in grads:
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step(lambda: torch.zeros(()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_step_of_galore_has_its_rank():
    loop = loop_of({"galore": {"rank": 3}}, dropout=0.0, weight_decay=0.0)
    before = trained_state(loop.model)
    before = {n: t.clone() for n, t in before.items()}
    loop.step([Batches()[0]])
    ranks = {}
    for n, t in trained_state(loop.model).items():
        if t.ndim == 2:
            s = torch.linalg.svdvals((t - before[n]).double())
            ranks[n] = int((s > 1e-4 * s[0]).sum()) if s[0] > 0 else 0
    projected = {n: r for n, r in ranks.items() if "encoder.layer" in n}
    assert len(projected) == 12 and set(projected.values()) == {3}
    assert max(r for n, r in ranks.items() if n not in projected) > 3


def test_galore_holds_projected_moments_only():
    loop = loop_of({"galore": {"rank": 2}}, kind="llama")
    batch = batch_of("llama")
    loop.step([batch])
    matrices = loop.method.matrices(loop.model)
    held = {id(p) for p in matrices}
    expected = sum((min(p.shape) + 2 * max(p.shape)) * 2 for p in matrices)
    expected += sum(2 * p.numel() for p in loop.model.parameters() if id(p) not in held)
    assert len(matrices) == 14 and optimizer_bytes(loop.optimizer) == 4 * expected
    assert optimizer_bytes(loop.optimizer) < optimizer_bytes_of_full_ft(batch)


def optimizer_bytes_of_full_ft(batch):
    loop = loop_of({"full_ft": {}}, kind="llama")
    loop.step([batch])
    return optimizer_bytes(loop.optimizer)


def test_galore_projects_the_published_layers():
    model = METHODS["galore"]().apply(build("roberta-base"), iter(()))
    matrices = METHODS["galore"]().matrices(model)
    assert sum(p.numel() for p in matrices) == 12 * (4 * 768 * 768 + 2 * 768 * 3072)


# MeZO


class Quadratic(torch.nn.Module):
    """L = 1/2 theta^T H theta."""

    def __init__(self, size=6):
        super().__init__()
        torch.manual_seed(0)
        root = torch.randn(size, size).double()
        self.H = root @ root.T / size
        self.theta = torch.nn.Parameter(torch.randn(size).double())

    def forward(self):
        return self.theta @ self.H @ self.theta / 2


def test_mezo_returns_to_where_it_was():
    model = random_model("bert").requires_grad_()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = MeZOSGD(model, 1e-3, 0.0, eps=1e-3)
    with torch.no_grad():
        for size in (1e-3, -2e-3, 1e-3):
            optimizer.move(5, size)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n], rtol=0, atol=1e-6)
    with torch.no_grad():
        optimizer.move(5, 1e-3)
    assert all((p - before[n]).abs().max() > 1e-4 for n, p in model.named_parameters() if p.numel() > 1)


def test_mezo_estimates_the_gradient():
    """On a quadratic, g z has the gradient as its mean: within four standard errors over 4000 seeds."""
    model = Quadratic()
    start, gradient = model.theta.detach().clone(), model.H @ model.theta.detach()
    optimizer = MeZOSGD(model, 1.0, 0.0, eps=1e-3)
    steps = []
    for _ in range(4000):
        optimizer.step(model)
        steps.append(start - model.theta.detach())
        model.theta.data.copy_(start)
    estimates = torch.stack(steps)
    error = (estimates.mean(0) - gradient).abs() / (estimates.std(0) / math.sqrt(4000))
    assert error.max() < 4 and gradient.abs().max() > 0.5


def test_mezo_steps_along_its_seed():
    """theta - lr g z with the z of the seed, where g is the slope of the quadratic along z, exactly."""
    model = Quadratic()
    start = model.theta.detach().clone()
    torch.manual_seed(3)
    MeZOSGD(model, 0.1, 0.0, eps=1e-3).step(model)
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    z = torch.randn(6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model.theta.detach(), start - 0.1 * (z @ model.H @ start) * z, rtol=1e-8, atol=1e-8)


def test_mezo_draws_its_noise_three_times_and_decays_matrices_alone(monkeypatch):
    model = torch.nn.Linear(4, 3).double()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer, drawn, x = MeZOSGD(model, 0.1, 0.5, eps=1e-3), [], torch.randn(5, 4).double()
    noise = MeZOSGD.noise
    monkeypatch.setattr(MeZOSGD, "noise", lambda self, seed: drawn.append(seed) or noise(self, seed))
    optimizer.step(lambda: model(x).sum())
    assert len(drawn) == 3 and len(set(drawn)) == 1
    z = [z for _, _, z in noise(optimizer, drawn[0])]
    slope = (x @ z[0].T + z[1]).sum()  # the loss is linear in its parameters
    expected = [start[0] * (1 - 0.1 * 0.5) - 0.1 * slope * z[0], start[1] - 0.1 * slope * z[1]]
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "parts", [{"mezo": {}}, {"lora": {}, "mezo": {}}, {"prefix_tuning": {"hidden": None}, "mezo": {"eps": 1e-1}}]
)
def test_mezo_builds_no_graph_and_keeps_nothing(parts):
    loop = loop_of(parts, dropout=0.5)
    kept, modes = [], []
    hook = loop.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    before = {n: t.clone() for n, t in trained_state(loop.model).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        first = loop.step([Batches()[0]])
    hook.remove()
    assert not kept and modes == [False, False] and loop.model.training and math.isfinite(first)
    assert all(p.grad is None for p in loop.model.parameters())
    assert optimizer_bytes(loop.optimizer) == 0 and not loop.method.backward
    assert all(not torch.equal(t, before[n]) for n, t in trained_state(loop.model).items())


def test_mezo_learns_with_lora():
    loop = loop_of({"lora": {}, "mezo": {}}, lr=3e-2, steps=150, schedule="constant", warmup=0.0)
    losses = [loop.step([Batches()[0]]) for _ in range(150)]
    assert losses[-1] < losses[0] - 0.05


# What cannot be


def test_where_nothing_is_called_b_lora_plus_says_so():
    with pytest.raises(Unsupported, match="factors called B"):
        method_of({"bitfit": {}, "lora_plus": {}}).apply(random_model("bert"), iter(()))


def test_where_no_matrix_is_trained_galore_says_so():
    with pytest.raises(Unsupported, match="projects gradients of matrices"):
        method_of({"bitfit": {}, "galore": {}}).apply(random_model("bert"), iter(()))


@pytest.mark.parametrize(
    "name, fields", [("lora_plus", {"ratio": 0.0}), ("galore", {"rank": 0}), ("galore", {"every": 0}), ("mezo", {"eps": 0.0})]
)  # fmt: skip
def test_wrong_fields_are_refused(name, fields):
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        METHODS[name](**fields)
