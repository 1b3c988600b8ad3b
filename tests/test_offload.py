"""What autograd keeps in the host's memory: the same numbers to the bit, each storage once, nothing left behind.

Without a GPU the host's memory is also the device's; that a storage was copied shows in the first one being gone.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from bench import offload
from bench.config import TrainConfig, compose
from bench.layout import recomputing
from bench.measure import probe
from bench.offload import Offload, View, keeping
from bench.packed import install
from bench.random_models import random_model
from bench.record import identity
from bench.run import _new_record, run
from bench.train import Loop
from methods import METHODS
from tests.test_methods import applied, batch_of, names, perturb
from tests.test_packed import batch_of as uneven

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_is_not_too_small(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)


def gradients(model, batch, kind):
    torch.manual_seed(3)
    model.train().zero_grad()
    with keeping(model, kind):
        loss = model(**batch).loss
    loss.backward()
    return [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(model, batch):
    plain, moved = (gradients(model, batch, kind) for kind in ("none", "activations"))
    assert len(plain) == len(moved) and all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@names
def test_gradients_are_the_same_bits(name):
    method, model = applied(name, "llama")
    perturb(model)
    if method.backward and not method.untrained:
        assert_same(model, batch_of("llama"))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_checkpointed_too(kind, checkpointing):
    model = METHODS["lora"](dropout=0.1).apply(random_model(kind), [])
    perturb(model)
    install(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})
    assert_same(model, uneven(kind))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_has_the_same_losses(precision):
    losses = []
    for kind in ("none", "activations"):
        method, model = applied("lora", "bert", dropout=0.1)
        cfg = TrainConfig(lr=1e-2, precision=precision)
        loop = Loop(model, method, cfg, steps=4, device=CPU)
        loop.cfg = replace(cfg, offload=kind)
        losses.append([loop.step([batch_of("bert")]) for _ in range(4)])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]


def counted(model, batch, kind):
    cost = probe(model, batch, lambda b: model(**b).loss, offload=kind)
    return cost["activations"], cost.get("offloaded")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_are_counted_where_they_lie(checkpointing, monkeypatch):
    _, model = applied("lora", "llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole, none = counted(model, batch_of("llama"), "none")
    assert none is None and counted(model, batch_of("llama"), "activations") == (0, whole)
    monkeypatch.setattr(offload, "SMALLEST", 4096)
    here, there = counted(model, batch_of("llama"), "activations")
    assert here + there == whole and here > 0 and there > 0
    monkeypatch.setattr(offload, "SMALLEST", 2**40)
    assert counted(model, batch_of("llama"), "activations") == (whole, 0)


def test_with_checkpointing_the_inputs_of_blocks_go():
    _, model = applied(
        "full_ft", "llama"
    )  # a frozen embedding's output is a leaf, which autograd also holds for its gradient
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda m, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
    with keeping(model.train(), "activations"):
        loss = model(**batch_of("llama")).loss
    assert len(seen) == len(model.model.layers) and all(s.expired() for s in seen)
    loss.backward()


def kept(make, *, own=()):
    """What hooks were given and made of it, in the forward pass of `make`, and its result."""
    away, packed = Offload(torch.nn.ParameterList(own)), []

    def pack(tensor):
        packed.append(away.pack(tensor))
        return packed[-1]

    with saved_tensors_hooks(pack, away.unpack):
        out = make()
    return out, packed, away


def test_weights_stay_and_a_storage_is_copied_once():
    x, w = torch.randn(4, 6, requires_grad=True), torch.nn.Parameter(torch.randn(6, 6))

    def make():
        h = x * 1
        a, b = h.split(3, 1)
        return ((h @ w.t()).sin() * (a * b).repeat(1, 2)).sum()

    out, packed, away = kept(make, own=[w])
    views = [p for p in packed if isinstance(p, View)]
    assert [p.data_ptr() for p in packed if not isinstance(p, View)] == [w.data_ptr()]
    assert len(views) > len({id(v.copy) for v in views}) == len(away.copies)
    grads = torch.autograd.grad(out, (x, w))
    for found, expected in zip(grads, torch.autograd.grad(make(), (x, w)), strict=True):
        assert torch.equal(found, expected)
    del views, packed[:], out
    assert not away.copies


def test_views_come_back_as_they_were_and_share_what_is_there():
    base = torch.arange(24.0).view(4, 6)
    views = [base.t(), base[1:, 2:], base[:1].expand(5, 6), base.view(torch.int32)]
    away = Offload(torch.nn.Module())
    back = [away.unpack(away.pack(v)) for v in views]
    for view, found in zip(views, back, strict=True):
        assert torch.equal(view, found) and view.stride() == found.stride() and view.dtype == found.dtype
    packed = [away.pack(v) for v in views]
    together = [away.unpack(p) for p in packed]
    assert len({t.untyped_storage().data_ptr() for t in together}) == 1 != len({t.data_ptr() for t in back})
    del together
    assert torch.equal(away.unpack(packed[0]), base.t())


def test_what_is_changed_in_place_is_kept_as_it_was():
    x = torch.randn(8, requires_grad=True)

    def make():
        h = x.exp()
        first = h.detach().clone().requires_grad_()
        y = first.sin()
        with torch.no_grad():
            first.mul_(2)
        return first, y.sum() + first.sin().sum()

    (first, out), _, _ = kept(make)
    assert torch.equal(torch.autograd.grad(out, first)[0], (first / 2).cos() + first.cos())


def test_conjugate_and_sparse_tensors_stay():
    away = Offload(torch.nn.Module())
    for tensor in (torch.randn(4, dtype=torch.complex64).conj(), torch.eye(3).to_sparse()):
        assert away.pack(tensor) is tensor


def test_a_cpu_has_no_other_memory(tmp_path):
    options = [f"results={tmp_path}", "method=lora", "model=random_bert", "task=rte", "data=standin", "wandb=off"]
    record = run(compose([*options, "device=cpu", "train.steps=1", "train.offload=activations"]))
    assert record.status == "failed" and "device=cpu" in record.reason and "train.offload=none" in record.reason


def test_it_is_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "check", lambda *_: None)
    options = [f"results={tmp_path}", "method=lora", "model=random_llama", "task=rte", "data=standin", "wandb=off"]
    options += ["device=cpu", "train.steps=2", "train.gradient_checkpointing=true"]
    plain, moved = (run(compose([*options, f"train.offload={kind}"])) for kind in ("none", "activations"))
    assert (plain.status, moved.status) == ("ok", "ok"), moved.reason
    assert plain.id != moved.id and plain.history == moved.history and plain.metrics == moved.metrics
    assert "offloaded" not in plain.memory and moved.memory["activations"] == 0
    assert moved.memory["offloaded"] == plain.memory["activations"] > 0
    assert json.loads((tmp_path / moved.id / "record.json").read_text())["config"]["train"]["offload"] == "activations"


def test_page_locked_memory_that_is_used_up_is_a_status(tmp_path, monkeypatch):
    def full(size, *, pinned):
        raise torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")

    monkeypatch.setattr(offload, "check", lambda *_: None)
    monkeypatch.setattr(offload, "_room", full)
    options = [f"results={tmp_path}", "method=lora", "model=random_bert", "task=rte", "data=standin", "wandb=off"]
    record = run(compose([*options, "device=cpu", "train.steps=1", "train.offload=activations"]))
    assert record.status == "oom" and "CUDA error: out of memory" in record.reason
    assert record.memory["peak_resident"] > 0


def test_only_where_it_is_on_is_it_another_run():
    none, moved = (_new_record(compose([f"train.offload={kind}"])).config for kind in ("none", "activations"))
    old = none | {"train": {k: v for k, v in none["train"].items() if k != "offload"}}
    assert identity(old, {}) == identity(none, {}) != identity(moved, {})


def test_what_cannot_be_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"train.offload='disk': the options are none, activations"):
        TrainConfig(offload="disk")
    with pytest.raises(Exception, match=r"shard=true with train.offload=activations"):
        compose(["shard=true", "train.offload=activations"])


@pytest.mark.gpu
def test_a_gpu_keeps_less_and_computes_the_same(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 2**10)
    _, model = applied("lora", "llama")
    model.cuda().train()
    batch = {k: v.repeat(64, 1).cuda() for k, v in batch_of("llama").items()}
    found, held = [], []
    for kind in ("none", "activations"):
        before = torch.cuda.memory_allocated()
        with keeping(model, kind):
            loss = model(**batch).loss
        held.append(torch.cuda.memory_allocated() - before)
        found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert held[1] < held[0] / 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
