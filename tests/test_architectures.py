"""The table of roles against the modules that transformers really builds."""

import re

import pytest
import torch
from torch import nn

from bench.hiera import HieraForImageClassification
from bench.random_models import random_model
from methods.architectures import ARCHITECTURES, GROUPS, role
from methods.base import Unsupported

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 384,
    "pad_token_id": 0,
}
HEADS = {"classifier", "lm_head", "pooler", "pre_classifier"}


def hiera(num_labels: int = 3) -> nn.Module:
    """Four stages of 1-1-2-1 blocks, 16 to 128 wide."""
    from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig

    widths = [16, 32, 64, 128]
    config = Sam2HieraDetConfig(
        hidden_size=16,
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 2, 4, 8],
        blocks_per_stage=[1, 1, 2, 1],
        global_attention_blocks=[3],
        num_labels=num_labels,
    )
    return HieraForImageClassification(config).eval()


def further(kind: str) -> nn.Module:
    """Architectures of the table that `random_model` does not build."""
    import transformers

    if kind == "hiera":
        return hiera()
    config = transformers.AutoConfig.for_model(kind, **TEXT, num_key_value_heads=2, head_dim=8)
    return transformers.AutoModelForCausalLM.from_config(config)


# layers; query, key, value, attention output; MLP input, output; all of them
COUNTS = {
    "bert": (2, 2, 2, 2, 2, 2, 2, 12),
    "roberta": (2, 2, 2, 2, 2, 2, 2, 12),
    "deberta": (2, 2, 2, 2, 2, 2, 2, 12),
    "distilbert": (2, 2, 2, 2, 2, 2, 2, 12),
    "vit": (2, 2, 2, 2, 2, 2, 2, 12),
    "llama": (2, 2, 2, 2, 2, 4, 2, 14),  # a gate beside the MLP's input
    "qwen2": (2, 2, 2, 2, 2, 4, 2, 14),
    "phi3": (2, 2, 2, 2, 2, 2, 2, 8),  # query, key and value are one layer, gate and up another
    "gpt2": (2, 2, 2, 2, 2, 2, 2, 8),
    "deit": (2, 2, 2, 2, 2, 2, 2, 12),
    "t5": (4, 6, 6, 6, 6, 4, 4, 32),  # encoder and decoder; the decoder attends to both
}
FURTHER = {
    "qwen3": (2, 2, 2, 2, 2, 4, 2, 14),
    "gemma3_text": (2, 2, 2, 2, 2, 4, 2, 14),
    "hiera": (5, 5, 5, 5, 5, 5, 5, 20),  # query, key and value are one layer
}
ROLES = ("layers", "query", "key", "value", "attention_output", "mlp_input", "mlp_output", "all_linear")


def matches(model: nn.Module, name: str) -> list[str]:
    """Names of the layers (role `layers`) or linear layers that play a role."""
    pattern = re.compile(role(model, name))
    named = [n for n, m in model.named_modules() if name == "layers" or isinstance(m, nn.Linear)]
    return [n for n in named if pattern.search(n)]


@pytest.mark.parametrize("kind", [*COUNTS, *FURTHER])
def test_each_role_matches_what_it_should(kind):
    model = random_model(kind) if kind in COUNTS else further(kind)
    found = tuple(len(matches(model, name)) for name in ROLES)
    assert dict(zip(ROLES, found, strict=True)) == dict(zip(ROLES, (COUNTS | FURTHER)[kind], strict=True))
    assert not any(set(n.split(".")) & HEADS for n in matches(model, "all_linear"))


@pytest.mark.parametrize("kind", [*COUNTS, *FURTHER])
def test_all_linear_leaves_nothing_but_heads(kind):
    model = random_model(kind) if kind in COUNTS else further(kind)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    left = {n for n in linear - set(matches(model, "all_linear")) if not set(n.split(".")) & HEADS}
    # where Hiera widens, and DeBERTa's projections of relative positions
    assert all(re.search(r"blocks\.\d+\.proj$|pos_(key|query)_proj$", n) for n in left)


def test_every_architecture_has_every_role():
    roles = set().union(*GROUPS.values()) | {"layers"}
    assert all(set(table) == roles for table in ARCHITECTURES.values())


def test_an_unknown_architecture_is_told_the_way_out():
    assert role(nn.Linear(2, 2), r"some\.pattern") == r"some\.pattern"
    with pytest.raises(Unsupported, match="regular expression"):
        role(nn.Linear(2, 2), "query")


def test_hiera_is_an_image_classifier_like_any_other(tmp_path):
    model = hiera()
    model.trunk.save_pretrained(tmp_path)
    loaded, info = HieraForImageClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    images, labels = torch.randn(2, 3, 128, 128), torch.tensor([0, 2])
    output = loaded(pixel_values=images, labels=labels)
    assert output.logits.shape == (2, 3)
    assert torch.allclose(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert torch.equal(loaded.trunk.blocks[0].attn.qkv.weight, model.trunk.blocks[0].attn.qkv.weight)
