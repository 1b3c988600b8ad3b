"""Methods that change the number of ranks: budgets, pruning, growth, and what survives a restart."""

import copy
import itertools

import pytest
import torch

from bench import checkpoint
from bench.model import load_trained_state, merge, trained_state, weights
from bench.random_models import random_model
from methods import METHODS
from methods.adalora import SVDLinear
from methods.increlora import IncreLoRALinear
from methods.sora import SoRALinear, soft_threshold
from tests.test_methods import applied, batch_of, learn, logits, perturb
from tests.test_parity import TOLERANCE, doubled

ADALORA = {"rank": 2, "init_rank": 3, "orthogonal": 0.3}
INCRELORA = {"rank": 3, "top": 2, "start": 0.1, "end": 0.8, "alpha": 4.0}


def modules(model, cls):
    return {n: m for n, m in model.named_modules() if isinstance(m, cls)}


@pytest.mark.parametrize("kind, interval", [("bert", 1), ("bert", 2), ("llama", 1), ("vit", 3)])
def test_adalora_agrees_with_peft(kind, interval):
    """Penalty, gradients, AdamW and the allocation of a whole run of 12 steps, from a non-zero state."""
    pytest.importorskip("peft")
    steps = 12
    method, ours = applied("adalora", kind, interval=interval, **ADALORA)
    start, end = method.bounds(steps)
    names = list(modules(ours, SVDLinear))
    config = {
        "init_r": 3,
        "target_r": 2,
        "tinit": start,
        "tfinal": steps - end,
        "deltaT": interval,
        "total_step": steps,
    }
    config |= {
        "orth_reg_weight": 0.3,
        "lora_alpha": 32 * (3 + 1e-5) / 3,
        "target_modules": names,
    }  # peft divides by r + 1e-5
    theirs = METHODS["hf"](type="ADALORA", config=config)
    other = theirs.apply(random_model(kind), iter(()))
    perturb(ours, 0.3)
    ours, other, batch = ours.double(), other.double(), doubled(kind)
    found, pairs = dict(other.named_parameters()), []
    for n, p in ours.named_parameters():
        if p.requires_grad:
            owner, _, last = n.rpartition(".")
            q = found[n if n in found else f"{owner}.layer.lora_{last}.default"]
            q.data.copy_(p.data.view_as(q))
            pairs.append((p, q))
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], 1e-2) for i in (0, 1)]
    ranks = []
    for step in range(steps):
        for m, model, optimizer in ((method, ours, optimizers[0]), (theirs, other, optimizers[1])):
            optimizer.zero_grad()
            (model.train()(**batch).loss + m.penalty(model)).backward()
        for p, q in pairs:
            torch.testing.assert_close(p.grad, q.grad.view_as(p), rtol=1e-5, atol=1e-8)
        for m, model, optimizer in ((method, ours, optimizers[0]), (theirs, other, optimizers[1])):
            optimizer.step()
            m.after_step(model, step, steps)
        ranks.append(method.numbers(ours)["rank"])
        for p, q in pairs:
            torch.testing.assert_close(p, q.view_as(p), rtol=1e-6, atol=1e-7)
    assert ranks[0] == 3 * len(names) and ranks[-1] == 2 * len(names)
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), rtol=1e-7, atol=1e-8)
    expected = weights(other)
    for n, w in weights(ours).items():
        torch.testing.assert_close(w, expected[n], rtol=1e-6, atol=1e-7)


def test_adalora_budget_is_the_cubic():
    method, steps, layers = METHODS["adalora"](rank=8, init_rank=12), 1000, 10
    start, end = method.bounds(steps)
    assert (start, end) == (150, 540)
    budget = [method.budget(step, steps, layers) for step in range(steps)]
    assert set(budget[: start + 1]) == {120} and set(budget[end:]) == {80}
    assert budget == sorted(budget, reverse=True)
    assert budget[345] == 80 + 40 // 8  # half way, an eighth is left


def test_adalora_pruned_values_stay_zero_and_may_come_back_before():
    method, model = applied("adalora", "bert", interval=1, initial=0.1, final=0.3, **ADALORA)
    layers, steps, came_back = list(modules(model, SVDLinear).values()), 40, 0
    optimizer = method.optimizer(model, 1e-2, 0.0)
    before = torch.cat([m.kept for m in layers])
    for step in range(steps):
        torch.manual_seed(step)
        batch = batch_of("bert")
        batch = {n: t[torch.randint(8, (4,))] for n, t in batch.items()}
        optimizer.zero_grad()
        (model.train()(**batch).loss + method.penalty(model)).backward()
        optimizer.step()
        method.after_step(model, step, steps)
        kept = torch.cat([m.kept for m in layers])
        assert int(kept.sum()) == method.budget(step, steps, len(layers)) == method.numbers(model)["rank"]
        assert not torch.cat([m.E for m in layers])[~kept].any()
        came_back += int((kept & ~before).sum())
        assert step <= method.bounds(steps)[1] or torch.equal(kept, before)
        before = kept
    assert came_back > 0
    assert sum(int(m.E.count_nonzero()) for m in layers) == 2 * len(layers)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_adalora_reaches_its_budget_in_the_shortest_runs(steps):
    method, model = applied("adalora", "bert", **ADALORA)
    learn(method, model.train(), batch_of("bert"), 1e-2, steps=steps)
    if steps > 1:
        assert method.numbers(model)["rank"] == 2 * len(modules(model, SVDLinear))


def test_dylora_is_lora_with_truncated_factors():
    """Forward, gradients and three steps at each rank, against `lora` of that rank with the same factors."""
    for rank in (1, 3, 8):
        method, ours = applied("dylora", "bert")
        perturb(ours)
        method.set(ours, rank)
        _, other = applied("lora", "bert", rank=rank, alpha=16.0)
        found, pairs = dict(other.named_parameters()), []
        for n, p in ours.named_parameters():
            if p.requires_grad:
                q, cut = found[n], slice(None) if n.startswith(("classifier", "bert.pooler")) else slice(rank)
                rows = (slice(None), cut) if n.endswith(".B") else cut
                q.data = p.data[rows].clone()
                pairs.append((p, q, rows))
        ours, other, batch = ours.double(), other.double(), doubled("bert")
        optimizers = [torch.optim.AdamW([t[i] for t in pairs], 1e-2, weight_decay=0.0) for i in (0, 1)]
        for _ in range(3):
            for model, optimizer in zip((ours, other), optimizers, strict=True):
                optimizer.zero_grad()
                model.train()(**batch).loss.backward()
            for p, q, rows in pairs:
                torch.testing.assert_close(p.grad[rows], q.grad, **TOLERANCE)
                assert p.grad.count_nonzero() == p.grad[rows].count_nonzero()
            for optimizer in optimizers:
                optimizer.step()
        for p, q, rows in pairs:
            torch.testing.assert_close(p[rows], q, rtol=1e-6, atol=1e-7)


def test_dylora_frozen_trains_one_rank():
    method, model = applied("dylora", "bert", frozen=True)
    perturb(model)
    method.set(model, 3)
    expected = copy.deepcopy(model)
    for m in expected.modules():
        m.frozen = False
    batch = batch_of("bert")
    torch.testing.assert_close(model.train()(**batch).loss, expected.train()(**batch).loss)
    model(**batch).loss.backward()
    expected(**batch).loss.backward()
    theirs = dict(expected.named_parameters())
    for n, p in model.named_parameters():
        if n.endswith((".A", ".B")):
            grad, whole = (p.grad, theirs[n].grad) if n.endswith(".A") else (p.grad.T, theirs[n].grad.T)
            assert grad[2].abs().max() > 0 and not grad[[0, 1, *range(3, 8)]].any() and whole[:3].any(1).all()
            torch.testing.assert_close(grad[2], whole[2])


def test_dylora_draws_every_rank_and_evaluates_with_its_own():
    method, model = applied("dylora", "bert", rank_min=2, rank=5, eval_rank=3)
    drawn = set()
    for step in range(60):
        method.after_step(model, step, 60)
        drawn.add(method.numbers(model)["rank_drawn"])
    assert drawn == {2, 3, 4, 5}
    perturb(model)
    batch, expected = batch_of("bert"), {}
    for rank in (2, 5):
        method.set(model, rank)
        expected[rank] = logits(model, batch)
    torch.testing.assert_close(expected[2], expected[5])
    merge(model)
    torch.testing.assert_close(logits(model, batch), expected[5], rtol=1e-5, atol=1e-6)


def test_sora_prox_is_the_soft_threshold():
    g = torch.tensor([-3.0, -1.5, 0.5, 3.0]) * 0.1
    torch.testing.assert_close(soft_threshold(g, 0.1), torch.tensor([-0.2, -0.05, 0.0, 0.2]))  # released: 0 for -.05


def test_sora_steps_are_adamw_and_the_prox_on_the_gates():
    method, ours = applied("sora", "bert", threshold=0.02)
    perturb(ours)
    ours = ours.double()
    other = copy.deepcopy(ours)
    optimizer, batch = method.optimizer(ours, 1e-2, 0.1), doubled("bert")
    gates = [m.gate for m in modules(other, SoRALinear).values()]
    ids = {id(g) for g in gates}
    rest = [p for p in other.parameters() if p.requires_grad and id(p) not in ids]
    plain = [torch.optim.AdamW(gates, 1e-2, weight_decay=0.0), torch.optim.AdamW(rest, 1e-2, weight_decay=0.1)]
    for _ in range(3):
        for model, optimizers in ((ours, [optimizer]), (other, plain)):
            model.zero_grad()
            model.train()(**batch).loss.backward()
            for o in optimizers:
                o.step()
        for g in gates:
            g.data = torch.where(g.abs() > 0.02, g - 0.02 * g.sign(), torch.zeros_like(g))
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_sora_forward_is_the_equation():
    _, model = applied("sora", "bert")
    perturb(model)
    layer = next(iter(modules(model, SoRALinear).values())).double()
    x = torch.randn(3, 5, layer.in_features, dtype=torch.double)
    W = layer.base.weight + 2.0 * layer.B @ torch.diag(layer.gate) @ layer.A
    torch.testing.assert_close(layer(x), x @ W.T + layer.base.bias, **TOLERANCE)


def test_sora_drops_closed_ranks_and_reloads_without_them():
    method, model = applied("sora", "bert", threshold=0.05)
    learn(method, model.train(), batch_of("bert"), 1e-2)
    layers = list(modules(model, SoRALinear).values())
    layers[0].gate.data.zero_()  # a layer that loses every rank
    open_, before = method.numbers(model), logits(model, batch_of("bert"))
    assert 0 == open_["rank_min"] < open_["rank"] < 8 * len(layers)
    method.finish(model)
    torch.testing.assert_close(logits(model, batch_of("bert")), before, rtol=1e-5, atol=1e-6)
    assert sum(m.A.shape[0] for m in layers) == open_["rank"] and layers[0].B.shape[1] == 0
    fresh_method, fresh = applied("sora", "bert", seed=1)
    fresh_method.finish(fresh)
    load_trained_state(fresh, trained_state(model))
    torch.testing.assert_close(logits(fresh, batch_of("bert")), before, rtol=1e-5, atol=1e-6)
    merge(fresh)
    torch.testing.assert_close(logits(fresh, batch_of("bert")), before, rtol=1e-5, atol=1e-5)


def test_only_elastic_layers_take_another_shape():
    _, model = applied("lora", "bert", rank=4)
    _, other = applied("lora", "bert", rank=8)
    with pytest.raises((ValueError, RuntimeError)):
        load_trained_state(model, trained_state(other))


def loop_of(name: str, fields: dict, steps: int = 12):
    """A training loop on one batch, and its step."""
    from bench.config import TrainConfig
    from bench.train import Loop

    torch.manual_seed(0)
    method = METHODS[name](**fields)
    model = method.apply(random_model("bert"), itertools.repeat(batch_of("bert")))
    torch.manual_seed(3)
    return Loop(model, method, TrainConfig(lr=1e-2, warmup=0.1), steps=steps, device=torch.device("cpu"))


RESUMED = {
    "adalora": ADALORA | {"interval": 2},
    "sora": {"threshold": 0.02},
    "dylora": {},
    "increlora": INCRELORA,
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_restart_changes_no_bit(name, tmp_path):
    """Stopped after 5 of 12 steps and taken up again in a new process's objects: the same weights, to the bit."""
    whole = loop_of(name, RESUMED[name])
    for step in range(12):
        whole.step([batch_of("bert")])
        if step == 4:
            checkpoint.save(tmp_path / "c.safetensors", whole, {})
    again = loop_of(name, RESUMED[name])
    checkpoint.load(tmp_path / "c.safetensors", again)
    for _ in range(7):
        again.step([batch_of("bert")])
    assert again.method.numbers(again.model) == whole.method.numbers(whole.model)
    states = again.method.state(again.model), whole.method.state(whole.model)
    assert states[0].pop("history", None) == states[1].pop("history", None)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    torch.testing.assert_close(trained_state(again.model), trained_state(whole.model), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, fields",
    [("adalora", {"init_rank": 4}), ("adalora", {"final": 0.9}), ("adalora", {"interval": 0}), ("sora", {"threshold": -1}),
     ("increlora", {"init_rank": 3}), ("increlora", {"top": 0}), ("dylora", {"rank_min": 9}), ("dylora", {"eval_rank": 0})],
)  # fmt: skip
def test_wrong_fields_are_refused(name, fields):
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        METHODS[name](**fields)


def test_increlora_grows_to_its_target_and_trains_what_grew():
    method, model = applied("increlora", "bert", grow=1, **INCRELORA)
    layers = modules(model, IncreLoRALinear)
    optimizer, steps, ranks, batch = method.optimizer(model, 1e-2, 0.0), 40, [], batch_of("bert")
    groups, names = len(optimizer.param_groups), set(trained_state(model))
    for step in range(steps):
        before = {n: m.rank for n, m in layers.items()}
        optimizer.zero_grad()
        (model.train()(**batch).loss + method.penalty(model)).backward()
        optimizer.step()
        method.after_step(model, step, steps)
        grown = {n for n, m in layers.items() if m.rank > before[n]}
        assert len(grown) in (0, 2) and all(layers[n].rank == before[n] + 1 for n in grown)
        ranks.append(method.numbers(model)["rank"])
    assert ranks[3] == len(layers) and ranks == sorted(ranks) and ranks[31:] == [3 * len(layers)] * 9
    assert len(optimizer.param_groups) == groups and names < set(trained_state(model))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    awake = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in held}) == len(held) and {id(p) for p in awake} <= {id(p) for p in held}
    assert all("exp_avg" in optimizer.state[p] for p in awake)
    assert all(not m.E[-1].any() for m in layers.values())  # what is still in reserve acts no more
    assert not any(m.score for m in layers.values())  # nor is anything scored
    before = logits(model, batch)
    method.finish(model)
    assert sum(m.A[0].shape[0] for m in layers.values()) == ranks[-1]
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-6)
    other, fresh = applied("increlora", "bert", seed=1, grow=1, **INCRELORA)
    other.finish(fresh)
    load_trained_state(fresh, trained_state(model))
    torch.testing.assert_close(logits(fresh, batch), before, rtol=1e-5, atol=1e-6)


def test_increlora_output_is_continuous_but_for_the_scale():
    """At a growth nothing but s = alpha / rank changes: E times new / old rank gives the old output back."""
    _, model = applied("increlora", "bert", grow=1, **INCRELORA)
    perturb(model)
    layer = next(iter(modules(model, IncreLoRALinear).values()))
    x = torch.randn(5, layer.in_features)
    before, rank = layer(x), layer.rank
    layer.add(1, layer.reserve)
    assert layer.rank == rank + 1
    for e in layer.E:
        e.data.mul_(layer.rank / rank)
    assert (layer(x) - before).norm() <= 1e-5 * before.norm()


def test_increlora_forward_and_score_are_the_equations():
    """Equation 6 from a dense change of weight, and the released smoothing."""
    method, model = applied("increlora", "bert", grow=1, **INCRELORA)
    perturb(model)
    model = model.double().train()
    layer = next(iter(modules(model, IncreLoRALinear).values()))
    x = torch.randn(3, 4, layer.in_features, dtype=torch.double)
    A, B, E = torch.cat([*layer.A]), torch.cat([*layer.B], 1), torch.cat([*layer.E])
    D = (4.0 / 1 * B @ torch.diag(E) @ A).detach().requires_grad_()
    dense = x @ (layer.base.weight + D).T + layer.base.bias
    torch.testing.assert_close(layer(x), dense, **TOLERANCE)
    layer(x).sin().sum().backward()
    dense.sin().sum().backward()
    expected = (D * D.grad).abs().sum() / D.numel() ** 0.5
    torch.testing.assert_close(layer.score, expected.detach(), **TOLERANCE)
    method.after_step(model, 0, 1000)
    torch.testing.assert_close(layer.smooth, 0.15 * expected.detach(), **TOLERANCE)
    torch.testing.assert_close(layer.unsure, 0.15 * 0.85 * expected.detach(), **TOLERANCE)
    assert layer.score == 0


def test_increlora_late_parameters_warm_up_of_their_own():
    method, model = applied("increlora", "bert", grow=1, **INCRELORA)
    optimizer = method.optimizer(model, 1e-2, 0.0)
    method.increase(model, warm=4)
    late = optimizer.param_groups[1]["params"]
    assert len(late) == 6
    moved = []
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        before = [p.detach().clone() for p in late]
        optimizer.step()
        moved.append(max(float((p - q).abs().max()) for p, q in zip(late, before, strict=True)))
        assert optimizer.param_groups[1]["lr"] == 1e-2
    torch.testing.assert_close(torch.tensor(moved), torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0]) * 1e-2, rtol=1e-3, atol=0)
