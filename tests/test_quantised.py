"""Quantised bases: codes against their definition and bitsandbytes, what they weigh, what training keeps and leaves."""

import pytest
import torch
from torch import nn

from bench.config import compose
from bench.measure import saved_bytes, weight_bytes
from bench.model import counts, merge, weights
from bench.random_models import random_model
from bench.record import identity
from bench.run import _new_record
from methods import METHODS
from methods.lora import LoRALinear
from methods.qlora import NF4, Int8Linear, NF4Linear, PackedLinear, Product, code_book, quantise
from tests.test_benchmarks import Live
from tests.test_methods import applied, batch_of, logits, perturb
from tests.test_optimizers import loop_of, resumes_bit_for_bit
from tests.test_parity import TOLERANCE
from tests.test_train import Batches


def linear(inner=128, outer=96, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(inner, outer).to(dtype).requires_grad_(False)


def test_the_code_book_is_normal_quantiles():
    """Section 3: evenly spaced probabilities, seven below zero and eight above, each half scaled to reach 1."""
    edge = 0.9677083
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64))[:-1]
    expected = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values / above.max()
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), expected, rtol=0, atol=1e-6)
    book = code_book("float8", torch.device("cpu"))
    assert len(book) == len(set(book.tolist())) == 256 and book.abs().max() == 1


def test_every_weight_goes_to_the_nearest_value():
    w = linear().weight
    codes, largest = quantise(w, 64, "nf4")
    blocks, book = w.view(-1, 64), torch.tensor(NF4)
    torch.testing.assert_close(largest, blocks.abs().amax(1))
    distance = (blocks[..., None] / largest[:, None, None] - book).abs()
    assert torch.equal(codes.long(), distance.argmin(-1))
    error = (book[codes.long()] * largest[:, None] - blocks).abs()
    half = (book[1:] - book[:-1]).max() / 2
    assert (error <= half * largest[:, None] + 1e-7).all()


@pytest.mark.parametrize("shape", [(128, 96), (10, 7), (64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_codes_and_scales_nearly(shape, dtype):
    """What the layer acts with is the plain blockwise NF4 weight, but for the 8 bits of its scales."""
    layer = linear(*shape, dtype=dtype)
    packed = NF4Linear(layer)
    codes, largest = quantise(layer.weight.float(), 64, "nf4")
    plain = (torch.tensor(NF4)[codes.long()] * largest[:, None]).flatten()[: layer.weight.numel()]
    assert packed.weight.dtype == dtype and packed.weight.shape == layer.weight.shape
    torch.testing.assert_close(packed.weight.float().flatten(), plain, rtol=2e-2, atol=2e-3)
    assert (packed.weight - layer.weight).abs().max() > 1e-4


def test_agrees_with_bitsandbytes():
    library = pytest.importorskip("bitsandbytes.functional")
    layer = linear(256, 512)
    codes, state = library.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = NF4Linear(layer)
    assert torch.equal(ours.packed.flatten(), codes.flatten())
    differs = (ours.scales.int() - state.absmax.int()).abs()
    assert differs.max() <= 1 and (differs > 0).float().mean() < 0.005  # at near ties the library's is not the nearest
    expected = library.dequantize_4bit(codes, state, quant_type="nf4")
    same = (differs == 0).repeat_interleave(64).view(512, 256)
    torch.testing.assert_close(ours.weight[same], expected[same], rtol=1e-6, atol=1e-7)


def test_weighs_half_a_byte_per_weight():
    layer = NF4Linear(linear(512, 1024).to(torch.float32))
    n = 512 * 1024
    assert (
        weight_bytes(layer) == n // 2 + n // 64 + 4 * n // 64 // 256 + 4 + 4 * 1024
    )  # codes, scales, theirs, mean; bias
    assert 0.51 < (weight_bytes(layer) - 4 * 1024) / n < 0.52  # 4.127 bits


def test_building_the_weight_takes_six_bytes_per_weight():
    """Indices of pairs and their values, or these and the weight in bfloat16."""
    layer = NF4Linear(linear(512, 1024).bfloat16())
    assert layer.weight.isfinite().all()  # the code books are there
    with (live := Live(layer)):
        layer.weight  # noqa: B018
    assert 6 <= (live.peak - weight_bytes(layer)) / (512 * 1024) < 6.2


def test_eight_bits_weigh_a_byte_per_weight_and_a_scale_per_output():
    layer = Int8Linear(linear(512, 1024))
    assert weight_bytes(layer) == 512 * 1024 + 4 * 1024 + 4 * 1024  # codes, scales; bias


def test_eight_bits_are_within_half_a_step_of_each_weight():
    layer = linear(128, 96)
    layer.weight.data[3] = 0
    layer.weight.data[5] *= 1000  # an outlier costs its own row alone
    steps = layer.weight.abs().amax(1, keepdim=True) / 127
    packed = Int8Linear(layer)
    assert ((packed.weight - layer.weight).abs() <= steps / 2 * 1.001).all()
    assert (packed.packed.abs().amax(1)[[i for i in range(96) if i != 3]] == 127).all()
    error = (packed.weight - layer.weight).norm() / (NF4Linear(layer).weight - layer.weight).norm()
    assert error < 0.15


def test_bits_are_4_or_8_and_only_8_is_another_run():
    with pytest.raises(ValueError, match=r"bits=3: the options are 4, 8"):
        METHODS["qlora"](bits=3)
    four, eight = (_new_record(compose(["method=qlora", f"method.bits={bits}"])).config for bits in (4, 8))
    old = four | {"method": {k: v for k, v in four["method"].items() if k != "bits"}}
    assert identity(old, {}) == identity(four, {}) != identity(eight, {})


@pytest.mark.parametrize(("bits", "dtype", "per_weight"), [(4, torch.uint8, 0.5), (8, torch.int8, 1)])
def test_the_model_weighs_what_is_packed(bits, dtype, per_weight):
    model = random_model("llama")
    dense = weight_bytes(model)
    linears = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n)
    total = counts(model, set())["total_params"]
    model = METHODS["qlora"](rank=2, bits=bits).apply(model, iter(()))
    added = counts(model, set())["trained_params"]
    packed = sum(p.numel() for p in model.parameters() if p.dtype == dtype)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    scales = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    assert packed == linears * per_weight
    assert weight_bytes(model) == dense - 4 * linears + packed + scales + 4 * added
    assert counts(model, set())["total_params"] == total + added  # weights, not bytes of codes


@pytest.mark.parametrize(("kind", "bits"), [("bert", 4), ("llama", 4), ("vit", 4), ("llama", 8)])
def test_is_lora_on_the_dequantised_model(kind, bits):
    """Outputs, gradients and three steps agree with LoRA on a model that holds the de-quantised weights densely."""
    _, ours = applied("qlora", kind, bits=bits)
    perturb(ours)
    _, theirs = applied("lora", kind, rank=8, targets="all_linear")
    for name, module in theirs.named_modules():
        if isinstance(module, LoRALinear):
            mine = ours.get_submodule(name)
            module.base.weight.data.copy_(mine.base.weight)
            module.A.data.copy_(mine.A), module.B.data.copy_(mine.B)
            module.scale = mine.scale
    for (n, p), (m, q) in zip(trainable(ours), trainable(theirs), strict=True):
        assert n == m
        q.data.copy_(p.data)
    batch = batch_of(kind)
    plain = logits(random_model(kind), batch)
    assert (logits(theirs, batch) - plain).abs().max() > 1e-3
    optimizers = [torch.optim.AdamW([p for _, p in trainable(m)], 1e-2) for m in (ours, theirs)]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
        for (_, p), (_, q) in zip(trainable(ours), trainable(theirs), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=1e-4, atol=1e-5)


def trainable(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("packed", [NF4Linear, Int8Linear])
def test_the_product_has_the_gradient_of_its_weight(packed):
    layer = packed(linear(12, 8))
    layer.dtype = torch.float64
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Product.apply(x, layer), x)
    expected = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected, **TOLERANCE)


def test_the_backward_keeps_no_dense_weight():
    """As many bytes as LoRA keeps beside a dense base: activations, and nothing of the size of a weight."""
    kept = []
    for name, fields in (("lora", {"targets": "all_linear", "rank": 8}), ("qlora", {})):
        _, model = applied(name, "llama", **fields)
        kept.append(saved_bytes(model, lambda m=model: m(**batch_of("llama")).loss))
    assert kept[1] <= kept[0]


def test_codes_stay_and_the_merge_is_into_dequantised_weights():
    loop = loop_of({"qlora": {"rank": 4}})
    fixed = {n: t.clone() for n, t in loop.model.named_parameters() if t.dtype == torch.uint8}
    start = {n: m.base.weight.clone() for n, m in loop.model.named_modules() if isinstance(m, LoRALinear)}
    for i in range(3):
        loop.step([Batches()[i]])
    now = dict(loop.model.named_parameters())
    assert fixed and all(torch.equal(t, now[n]) for n, t in fixed.items())
    change = {n: m.scale * (m.B @ m.A).detach() for n, m in loop.model.named_modules() if isinstance(m, LoRALinear)}
    merge(loop.model)
    assert not any(isinstance(m, NF4Linear) for m in loop.model.modules())
    for n, w in start.items():
        assert change[n].abs().max() > 0
        torch.testing.assert_close(weights(loop.model)[n], w + change[n])


def test_resumes_bit_for_bit(tmp_path):
    resumes_bit_for_bit(tmp_path, {"qlora": {"rank": 4}})


@pytest.mark.parametrize("part", [{"lora_plus": {}}, {"ist": {}}, {"mezo": {}}], ids=" ".join)
def test_parts_act_on_it(part):
    loop = loop_of({"qlora": {"rank": 4}} | part)
    losses = [loop.step([Batches()[i]]) for i in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))


def test_trains_under_autocast():
    loop = loop_of({"qlora": {"rank": 4}}, precision="bf16", steps=40, lr=1e-2)
    losses = [loop.step([Batches()[i % 4]]) for i in range(40)]
    assert sum(losses[-4:]) < sum(losses[:4])
