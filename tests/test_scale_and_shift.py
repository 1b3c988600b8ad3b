"""Methods that scale and shift activations: counts, equations, merging."""

import copy
import itertools

import pytest
import torch
from torch import nn

from bench.model import merge, trained_state
from bench.random_models import random_model
from benchmarks.floor import counted, floor
from methods import METHODS, Adapted
from tests.test_architectures import further
from tests.test_methods import applied, batch_of, logits, perturb
from tests.test_parity import compare, doubled

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def folded(model: nn.Module, plain: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """`plain` with hooks that scale and shift each operation's output in its own shape, and {our parameter: its}."""
    matched = {}
    for name, module in model.named_modules():
        if not isinstance(module, Adapted):
            continue
        at = plain.get_submodule(name)
        channels_first = hasattr(at, "projection")
        at = at.projection if channels_first else at
        shape = (-1, 1, 1) if channels_first else (-1,)
        scale, shift = (nn.Parameter(p.detach().clone()) for p in (module.scale, module.shift))
        at.register_forward_hook(
            lambda m, x, y, scale=scale, shift=shift, shape=shape: y * scale.view(shape) + shift.view(shape)
        )
        matched |= {module.scale: scale, module.shift: shift}
    return plain, matched


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_ssf_agrees_with_the_equation(kind):
    _, ours = applied("ssf", kind)
    perturb(ours, 0.2)
    ours, plain = ours.double(), random_model(kind).double()
    other, matched = folded(ours, plain)
    heads = [n for n, p in plain.named_parameters() if p.requires_grad]
    for n in heads:
        plain.get_parameter(n).data.copy_(ours.get_parameter(n).data)
        matched[ours.get_parameter(n)] = plain.get_parameter(n)
    assert {id(p) for p in matched} == {id(p) for p in ours.parameters() if p.requires_grad}
    batch = doubled(kind)
    torch.testing.assert_close(logits(ours, batch), logits(other, batch), **EXACT)
    assert (logits(ours, batch) - logits(random_model(kind).double(), batch)).abs().max() > 1e-2
    compare(ours, other, matched, batch)


def test_ssf_keeps_the_output_of_each_linear_layer_and_of_no_norm():
    _, ours = applied("ssf", "bert")
    plain, rows, sizes = random_model("bert"), batch_of("bert"), []
    for m in ours.modules():
        if isinstance(m, Adapted) and isinstance(m.base, nn.Linear):
            m.register_forward_hook(lambda m, x, y: sizes.append(y.numel() * y.element_size()))
    found = counted(ours, rows)["activations"] - floor(plain, rows)["activations"]
    outputs = sum(sizes)
    folded_norms = sum(3 * m.scale.nbytes for m in ours.modules() if isinstance(getattr(m, "base", None), nn.LayerNorm))
    assert outputs <= found <= outputs + folded_norms


@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "gpt2", "t5", "hiera", "gemma3_text"])
def test_ssf_merges_into_every_layer_exactly(kind):
    build = random_model if kind not in ("hiera", "gemma3_text") else lambda k: frozen(further(k))
    torch.manual_seed(0)
    plain = build(kind).double()
    for p in plain.parameters():  # random biases too
        p.data += 0.02 * torch.randn_like(p)
    names = {n for n, _ in plain.named_parameters()}
    if kind == "hiera":
        batch = {"pixel_values": torch.randn(2, 3, 128, 128, dtype=torch.double)}
    else:
        batch = doubled("llama" if kind == "gemma3_text" else kind)
    before = logits(copy.deepcopy(plain), batch)
    model = METHODS["ssf"](init_std=0.2).apply(plain, itertools.repeat(batch))
    perturb(model, 0.1)
    expected = logits(model, batch)
    assert (expected - before).abs().max() > 1e-2
    merge(model)
    assert not any(isinstance(m, Adapted) for m in model.modules())
    assert {n for n, _ in model.named_parameters()} == names
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if kind == "gemma3_text" else EXACT  # its norms compute in float32
    torch.testing.assert_close(logits(model, batch), expected, **tolerance)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def test_ssf_starts_near_one_and_zero():
    _, model = applied("ssf", "vit")
    state = trained_state(model)
    scales = torch.cat([t for n, t in state.items() if n.endswith("scale")])
    shifts = torch.cat([t for n, t in state.items() if n.endswith("shift")])
    assert len(scales) == len(shifts) == 2 * (8 * 32 + 64 - 32) + 2 * 32
    assert abs(scales.mean() - 1) < 5e-3 and abs(shifts.mean()) < 5e-3
    assert 0.017 < scales.std() < 0.023 and 0.017 < shifts.std() < 0.023


def test_ssf_refuses_a_negative_deviation():
    with pytest.raises(ValueError, match="-1"):
        METHODS["ssf"](init_std=-1)
