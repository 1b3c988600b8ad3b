"""Methods that change weights, against the plain model with those weights: outputs, gradients, steps, and what is kept."""

import copy

import pytest
import torch
from torch.func import functional_call

from bench.random_models import random_model
from methods import METHODS, Adapted
from tests.test_methods import KINDS, applied, batch_of, perturb
from tests.test_parity import TOLERANCE, doubled

FIELDS = {"dylora": {"rank_min": 8}, "oft": {"block": 8}, "qlora": {"rank": 8, "dropout": 0.0}}
CHANGING = sorted(n for n, cls in METHODS.items() if cls.mergeable and n not in ("compose", "hf", "lora_plus", "ist"))
IN_PLACE = {"bitfit", "full_ft", "galore", "hft", "linear_probe", "lisa", "ln_tuning", "mezo", "telly", "zero_shot"}
changing = pytest.mark.parametrize("name", [n for n in CHANGING if n not in IN_PLACE])


def dense(model: torch.nn.Module, plain: torch.nn.Module, batch) -> torch.Tensor:
    """The loss of `plain` with the weights and biases that the layers of `model` say they act with."""
    own = {n.replace(".base.", "."): p for n, p in model.named_parameters()}
    values = {n: own[n] for n, _ in plain.named_parameters() if n in own}
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            layer = name if module.owner() is module.base else f"{name}.projection"
            values |= {f"{layer}.weight": module.weight()} | (
                {f"{layer}.bias": b} if (b := module.bias()) is not None else {}
            )
    return functional_call(plain, values, kwargs=batch, tie_weights=False).loss


@changing
@pytest.mark.parametrize("kind", KINDS)
def test_acts_as_its_weight_through_three_steps(name, kind):
    """Whatever bypass a method takes, loss and gradients are those of the dense weight, step after step."""
    _, ours = applied(name, kind, **FIELDS.get(name, {}))
    perturb(ours)
    ours, plain, batch = ours.double(), random_model(kind).double(), doubled(kind)
    other = copy.deepcopy(ours)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (ours, other)]
    optimizers = [torch.optim.AdamW(ps, 1e-2) for ps in trained]
    start = plain(**batch).loss
    for _ in range(3):
        losses = ours(**batch).loss, dense(other, plain, batch)
        assert (losses[0] - start).abs() > 1e-6
        torch.testing.assert_close(*losses, **TOLERANCE)
        grads = [torch.autograd.grad(loss, ps) for loss, ps in zip(losses, trained, strict=True)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        for optimizer, ps, gs in zip(optimizers, trained, grads, strict=True):
            for p, g in zip(ps, gs, strict=True):
                p.grad = g
            optimizer.step()


def largest(name: str, **fields) -> int:
    """Bytes of the largest storage that is kept for the backward of 10 tokens and is no parameter or buffer."""
    _, model = applied(name, "bert", **FIELDS.get(name, {}) | fields)
    perturb(model)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    batch, kept = {n: t[:2, :5] if t.ndim == 2 else t[:2] for n, t in batch_of("bert").items()}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.is_floating_point():
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(**batch).loss.backward()
    return max(kept)


@changing
def test_keeps_no_matrix_of_a_weights_size(name):
    """What is kept beside parameters is activations, at most 10 x 64 numbers: the smallest weight has 32 x 32."""
    assert largest(name) < 4 * 32 * 32


def test_a_weight_that_is_built_is_kept():
    """Bone's block form, whose paper builds it."""
    assert largest("miss", form="bat", rank=8) >= 4 * 32 * 32
