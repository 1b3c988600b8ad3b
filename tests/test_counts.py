"""Trained parameters equal each paper's formula, at published shapes (on the meta device, so nothing is computed)."""

import itertools
import re

import pytest
import torch

from bench.model import freeze, trained_state
from bench.random_models import random_model
from methods import METHODS, Unsupported
from methods.architectures import role

SHAPES = {  # L blocks, width d, FFN width f, key/value width
    "roberta-base": {"L": 12, "d": 768, "f": 3072, "kv": 768},
    "bert-base": {"L": 12, "d": 768, "f": 3072, "kv": 768},
    "vit-base": {"L": 12, "d": 768, "f": 3072, "kv": 768},
    "llama-3-8b": {"L": 32, "d": 4096, "f": 14336, "kv": 1024},
}
TOTALS = {  # all parameters, and those of the head
    "roberta-base": (124_647_170, 592_130),
    "bert-base": (109_483_778, 1_538),
    "vit-base": (85_800_194, 1_538),
    "llama-3-8b": (8_030_261_248, 0),
    "roberta-large": (355_361_794, 1_051_650),
}


def build(name: str) -> torch.nn.Module:
    import transformers

    with torch.device("meta"):
        if "roberta" in name:
            wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
            text = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
            config = transformers.RobertaConfig(**text, **(wide if "large" in name else {}))
            model, head = transformers.RobertaForSequenceClassification(config), ("classifier",)
        elif name == "bert-base":
            model, head = transformers.BertForSequenceClassification(transformers.BertConfig()), ("classifier",)
        elif name == "vit-base":
            model, head = transformers.ViTForImageClassification(transformers.ViTConfig()), ("classifier",)
        else:
            config = transformers.LlamaConfig(
                vocab_size=128256,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_key_value_heads=8,
            )
            model, head = transformers.LlamaForCausalLM(config), ()
    freeze(model, head)
    return model


def trained(name: str, method) -> int:
    model = method.apply(build(name), iter(()))
    return sum(p.numel() for p in trained_state(model).values()) - TOTALS[name][1]


def linears(s, shape: str) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of one block; Llama's FFN has a gate."""
    d, f, kv = s["d"], s["f"], s["kv"]
    return [(d, d), (kv, d), (kv, d), (d, d), (f, d), (d, f)] + [(f, d)] * ("llama" in shape)


def bottlenecks(s, width: int, per_block: int = 1) -> int:
    return s["L"] * per_block * (2 * s["d"] * width + width + s["d"])


def norms(s, shape: str) -> int:
    return (2 * s["L"] + 1) * s["d"] * (1 if "llama" in shape else 2)  # RMSNorm has no shift


def lora(s, rank: int = 8) -> int:
    return s["L"] * rank * ((s["d"] + s["d"]) + (s["d"] + s["kv"]))


def all_linear(s, shape: str, rank: int, per_rank: int = 0) -> int:
    """r (m + n + per_rank) over the linear layers of the blocks."""
    return s["L"] * rank * sum(m + n + per_rank for m, n in linears(s, shape))


def block(s, shape: str, k: int = 1) -> int:
    """All parameters of a block that is k times narrower."""
    norm = 2 * s["d"] // k
    if "llama" in shape:
        return sum(m // k * (n // k) for m, n in linears(s, shape)) + norm
    return sum(m // k * (n // k) + m // k for m, n in linears(s, shape)) + 2 * norm


def last_norm(s, shape: str, k: int = 1) -> int:
    """BERT has its 2 L + 1st norm behind the embeddings, the others behind the blocks."""
    return {"vit-base": 2, "llama-3-8b": 1}.get(shape, 0) * s["d"] // k


def biases(s, shape: str) -> int:
    """Of linear layers and norms; of ViT's patch embedding and of the pooler that BERT's pretraining has."""
    per_block = sum(m for m, _ in linears(s, shape)) + 2 * s["d"]
    return s["L"] * per_block + s["d"] + (shape in ("vit-base", "bert-base")) * s["d"]


def ladder(s, shape: str, k: int = 8) -> int:
    """LST: every fourth block is left out; a ladder and a gate each, one below and one above."""
    d, w = s["d"], s["d"] // k
    per_block = block(s, shape, k) + d * w + w + 1
    return s["L"] * 3 // 4 * per_block + (d * w + w) + (w * d + d) + last_norm(s, shape, k)


def above(s, shape: str, blocks: int = 5) -> int:
    """Telly: all but embeddings and the bottom blocks; the rest is a pooler, or Llama's output layer."""
    ends = {"bert-base": 768 * 768 + 768, "llama-3-8b": 128256 * 4096}
    return (s["L"] - blocks) * block(s, shape) + last_norm(s, shape) + ends.get(shape, 0)


def scale_and_shift(s, shape: str) -> int:
    """SSF: a scale per output of every linear layer, norm and patch embedding, and a shift where there is a bias."""
    outputs = s["L"] * (sum(m for m, _ in linears(s, shape)) + 2 * s["d"]) + s["d"] * (1 + ("vit" in shape))
    return outputs * (1 if "llama" in shape else 2)


def compacter(s, shape: str, n: int = 4) -> int:
    return n**3 + 2 * s["L"] * 3 * (s["d"] + s["d"] // 32) + norms(s, shape)


def everything(s, shape: str) -> int:
    return TOTALS[shape][0] - TOTALS[shape][1]


def pairs(count):
    """Of query and value, from the size of one of width d and one of width kv: `count(m, n)`."""
    return lambda s, _: s["L"] * (count(s["d"], s["d"]) + count(s["kv"], s["d"]))


FORMULAS = {
    "adalora": lambda s, shape: all_linear(s, shape, 12, 1),
    "adaptformer": lambda s, _: bottlenecks(s, 64),
    "apet": lambda s, _: lora(s),
    "bitfit": biases,
    "compacter": compacter,
    "compose": lambda s, _: lora(s),
    "dora": lambda s, _: lora(s) + s["L"] * (s["d"] + s["kv"]),
    "dylora": lambda s, _: lora(s),
    "full_ft": everything,
    "galore": everything,
    "hf": lambda s, _: lora(s),
    "hft": None,  # depends on the draw where sizes differ: see test_hft_trains_half_of_every_kind_of_layer
    "houlsby": lambda s, shape: bottlenecks(s, 64, 2) + norms(s, shape),
    "ia3": lambda s, _: s["L"] * (2 * s["kv"] + s["f"]),
    "increlora": lambda s, shape: all_linear(s, shape, 2, 1),  # rank 1 and the reserve
    "ist": lambda s, _: lora(s),
    "linear_probe": lambda s, _: 0,
    "zero_shot": lambda s, _: 0,
    "lisa": everything,
    "ln_tuning": norms,
    "lora": lambda s, _: lora(s),
    "lora_freeze_a": pairs(lambda m, n: 8 * m),
    "lora_plus": lambda s, _: lora(s),
    "lora_xs": pairs(lambda m, n: 25**2),
    "lst": ladder,
    "mezo": everything,
    "miss": pairs(lambda m, n: 64 * m),
    "nola": pairs(lambda m, n: 1024 + 1024),
    "oft": pairs(lambda m, n: n * 31 // 2),
    "parallel_adapter": lambda s, _: bottlenecks(s, 512),
    "pfeiffer": lambda s, _: bottlenecks(s, 48),
    "pissa": lambda s, _: lora(s),
    "prefix_tuning": lambda s, _: 10 * s["d"] + (s["d"] + 1) * 512 + 513 * 2 * s["L"] * s["kv"],
    "prompt_tuning": lambda s, _: 100 * s["d"],
    "qlora": lambda s, shape: all_linear(s, shape, 64),
    "sora": lambda s, shape: all_linear(s, shape, 8, 1),
    "ssf": scale_and_shift,
    "svfit": pairs(lambda m, n: 768),
    "telly": above,
    "vera": pairs(lambda m, n: 1024 + m),
    "vpt_deep": lambda s, _: s["L"] * 50 * s["d"],
    "vpt_shallow": lambda s, _: 50 * s["d"],
}
FIELDS = {"lst": {"start": "random"}}  # other starts look at data and weights, which the meta device has not
IMPOSSIBLE = {
    ("adaptformer", "bert-base"), ("adaptformer", "roberta-base"), ("bitfit", "llama-3-8b"),
    ("linear_probe", "llama-3-8b"), *(("zero_shot", s) for s in ("bert-base", "roberta-base", "vit-base")), ("prompt_tuning", "vit-base"),
    *itertools.product(("vpt_deep", "vpt_shallow"), ("bert-base", "roberta-base", "llama-3-8b")),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_count_is_the_formula_of_the_paper(name, shape):
    method = METHODS[name](**FIELDS.get(name, {}))
    if (name, shape) in IMPOSSIBLE:
        with pytest.raises(Unsupported):
            trained(shape, method)
    elif FORMULAS[name] is not None:
        assert trained(shape, method) == FORMULAS[name](SHAPES[shape], shape)


@pytest.mark.parametrize("shape", TOTALS)
def test_the_totals_are_those_of_the_published_models(shape):
    parameters = build(shape).parameters()
    sizes = [(p.numel(), p.requires_grad) for p in parameters]
    assert (sum(n for n, _ in sizes), sum(n for n, head in sizes if head)) == TOTALS[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_hft_trains_half_of_every_kind_of_layer(shape):
    """In each block two of four of the attention, one of two norms; of an FFN of three, in half of the blocks one more."""
    model, blocks, ffn = (
        METHODS["hft"]().apply(build(shape), iter(())),
        SHAPES[shape]["L"],
        len(linears(SHAPES[shape], shape)) - 4,
    )

    def on(part: str) -> int:
        """How many of the modules that play a role are trained."""
        pattern = re.compile(role(model, part) if part != "norm" else r"layers?\.\d+\..*norm\w*$", re.IGNORECASE)
        return sum(m.weight.requires_grad for n, m in model.named_modules() if pattern.search(n))

    assert (on("attention"), on("mlp"), on("norm")) == (2 * blocks, blocks * ffn / 2, blocks)


PUBLISHED = [  # papers and released code, without the head
    ("roberta-base", "lora", {"rank": 8}, 294_912),
    ("roberta-base", "vera", {}, 43_008),
    ("roberta-base", "ln_tuning", {}, 38_400),
    ("roberta-base", "bitfit", {}, 102_144),
    ("roberta-base", "bitfit", {"biases": "query_mlp"}, 12 * (768 + 3072)),
    ("roberta-base", "lora_freeze_a", {"rank": 16}, 294_912),  # LoRA's at rank 8
    ("roberta-base", "nola", {"rank": 1}, 49_152),  # whatever the rank
    ("roberta-base", "svfit", {}, 294_912 // 16),  # "16 times fewer"
    ("roberta-base", "miss", {"form": "bat"}, 1_179_648),
    ("roberta-base", "full_ft", {}, 124_647_170 - 592_130),
    ("roberta-large", "lora", {"rank": 8}, 786_432),
    ("roberta-large", "ln_tuning", {}, 100_352),
    ("roberta-large", "bitfit", {}, 271_360),
    ("llama-3-8b", "lora", {"rank": 16, "targets": r"(k|v|down)_proj$"}, 14_680_064),
    ("llama-3-8b", "ln_tuning", {}, 266_240),
    ("llama-3-8b", "prompt_tuning", {}, 409_600),
    ("llama-3-8b", "ia3", {}, 524_288),
    ("vit-base", "lora", {}, 294_912),
    ("vit-base", "adaptformer", {"width": 8}, 156_768),
    ("vit-base", "adaptformer", {"width": 4}, 82_992),
    ("vit-base", "bitfit", {}, 102_912),
    ("vit-base", "ssf", {}, 205_824),
    ("vit-base", "ln_tuning", {}, 38_400),
    ("vit-base", "vpt_deep", {}, 460_800),
    ("vit-base", "vpt_shallow", {}, 38_400),
    ("vit-base", "telly", {"blocks": 11}, 7_089_408),
]


@pytest.mark.parametrize("shape, name, fields, count", PUBLISHED)
def test_count_is_the_published_one(shape, name, fields, count):
    assert trained(shape, METHODS[name](**fields)) == count


@pytest.mark.parametrize("hidden", [None, 16])
def test_a_stored_prefix_has_grouped_heads_and_no_mlp(hidden):
    method = METHODS["prefix_tuning"](length=5, hidden=hidden)
    model = method.apply(random_model("llama"), iter(()))
    method.finish(model)
    assert sum(p.numel() for p in trained_state(model).values()) == 2 * 2 * 5 * 16  # 2 of 4 heads of width 8
