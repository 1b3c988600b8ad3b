"""A footprint that is extrapolated from shallow models is that of the whole model, to the byte and the FLOP."""

import pytest

import methods  # noqa: F401  (registers them)
from bench import depth
from bench.config import compose
from bench.depth import counted
from bench.footprint import footprint
from bench.random_models import RANDOM
from methods.base import METHODS, Unsupported

BLOCKS = 8
ROWS = [40, 31, 24, 8]
DIFFERENT = (
    "hft",
    "ist",
    "lisa",
    "lst method.reduction=2",
    "telly",
)  # what they do with a block depends on which it is
NARROW = {
    "compacter": "method.n=4 method.reduction=4",
    "lst": "method.reduction=2",
    "miss": "method.rank=8",
}  # where tiny models need it


@pytest.fixture(autouse=True)
def deep(monkeypatch):
    """Tiny models of more blocks, and nothing counted yet."""
    monkeypatch.setattr(depth, "_known", {})
    for kind in ("bert", "llama", "vit"):
        monkeypatch.setitem(RANDOM, kind, RANDOM[kind] | {"num_hidden_layers": BLOCKS})


def both(monkeypatch, *overrides, rows=ROWS, gpu=True):
    """Two footprints of one cell, extrapolated where that can be and whole; and the depths that the first one counted."""
    depths = []

    def noted(*args, depth, **kwargs):
        depths.append(depth)
        return footprint(*args, depth=depth, **kwargs)

    monkeypatch.setattr(depth, "footprint", noted)
    config = compose(["task=rte", *overrides])
    rows = [1, 1] if config.task.kind == "image" else rows
    return counted(config, rows, gpu=gpu, at_once=True), footprint(config, rows, gpu=gpu), depths


@pytest.mark.parametrize("model", ("random_bert", "random_llama"))
@pytest.mark.parametrize("method", ("lora", "full_ft", "nola", *DIFFERENT))
def test_blocks_that_are_alike_are_extrapolated_and_others_are_counted(monkeypatch, method, model):
    found, whole, depths = both(monkeypatch, *f"method={method}".split(), f"model={model}")
    assert found == whole
    assert (None in depths) == (method in DIFFERENT), depths


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("rows", ([8] * 2, [400] * 16))
def test_a_peak_that_will_be_overtaken_is_not_extrapolated(monkeypatch, rows, precision):
    """Where gradients outgrow activations, the step's end has the most bytes; but in shallow models the loss may have them."""
    options = ("train.gradient_checkpointing=true", f"train.precision={precision}")
    found, whole, _ = both(monkeypatch, "method=full_ft", "model=random_llama", *options, rows=rows)
    assert found == whole


def test_other_rows_of_a_kind_need_no_second_proof(monkeypatch):
    _, _, depths = both(monkeypatch, "method=lora", "model=random_llama")
    depths.clear()
    config = compose(["task=rte", "method=lora", "model=random_llama"])
    found = counted(config, [17, 17], gpu=True)
    assert depths == [1, 2]
    assert found == footprint(config, [17, 17], gpu=True, at_once=False)


def test_what_a_line_is_made_of_is_counted(monkeypatch):
    config = compose(["task=rte", "method=lora", "model=random_bert"])
    one, two, whole = (footprint(config, ROWS, depth=n) for n in (1, 2, None))
    assert depth.along(config, one, two, BLOCKS - 1) == whole != two
    assert not depth._peaks_stay(one, two, two | {"forward_peak": 0})


@pytest.mark.slow
@pytest.mark.parametrize("gpu", (False, True))
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"zero_shot"}))  # which has no step
def test_every_method(monkeypatch, method, gpu):
    counts = 0
    for model in ("random_bert task=rte", "random_llama task=rte", "random_vit task=digits"):
        try:
            options = f"method={method} {NARROW.get(method, '')} model={model}"
            found, whole, _ = both(monkeypatch, *options.split(), gpu=gpu)
        except Unsupported:
            continue
        counts += 1
        assert found == whole, model
    assert counts


@pytest.mark.slow
@pytest.mark.parametrize("method", ("full_ft", "lora", "ia3"))
@pytest.mark.parametrize(
    "model", ("qwen25_05b task=gsm8k", "roberta_large task=rte", "deberta_v3_base task=rte", "deit_small task=vtab_dtd")
)
@pytest.mark.parametrize("rows", ([128] * 8, [8] * 2, [512, 300, 200, 20]))
def test_models_of_full_size(monkeypatch, method, model, rows):
    found, whole, _ = both(
        monkeypatch, f"method={method}", *f"model={model}".split(), "train.precision=bf16", rows=rows
    )
    assert found == whole
