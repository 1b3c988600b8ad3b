"""Models from their shapes alone: on torch's meta device, without weights, for counting before anything is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench.model import freeze, linear_conv1d, of_a_kind
from bench.random_models import HEADS, RANDOM

if TYPE_CHECKING:
    from bench.config import ModelConfig
    from tasks import Task

# what the hub's config.json say where it is not the default of transformers
SHAPES: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": dict(model_type="bert"),
    "FacebookAI/roberta-base": dict(model_type="roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "FacebookAI/roberta-large": dict(
        model_type="roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, hidden_size=1024,
        num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    ),
    "microsoft/deberta-v3-base": dict(
        model_type="deberta-v2", vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        pooler_hidden_size=768,
    ),
    "facebook/deit-small-patch16-224": dict(
        model_type="vit", hidden_size=384, num_attention_heads=6, intermediate_size=1536,
    ),
    "google/vit-base-patch16-224-in21k": dict(model_type="vit"),
    "openai-community/gpt2": dict(model_type="gpt2"),
    "google-t5/t5-base": dict(model_type="t5", d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128),
    "meta-llama/Llama-3.2-1B": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-3B": dict(
        model_type="llama", vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-0.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-1.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-135M": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-360M": dict(
        model_type="llama", vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
        num_attention_heads=15, num_key_value_heads=5, tie_word_embeddings=True,
    ),
}  # fmt: skip


class UnknownShape(Exception):
    """Nothing here says how large this model is."""


def skeleton(cfg: ModelConfig, task: Task, depth: int | None = None) -> nn.Module:
    """The model of `cfg` with the head of `task` on the meta device, frozen but for the head; of so many blocks, or all.

    Raises UnknownShape, Unsupported.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    config = architecture(cfg.path)
    if depth is not None:
        config.num_hidden_layers = depth
    if not hasattr(transformers, task.model_class) or config.model_type.startswith("sam2"):
        raise UnknownShape(f"{cfg.path}: no class of transformers")
    for key, value in task.options(config).items():
        setattr(config, key, value)
    if task.kind != "image" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    options: dict[str, Any] = dict(dtype=getattr(torch, cfg.dtype))
    if not cfg.path.startswith("random:"):  # these have what their architecture has
        options["attn_implementation"] = cfg.attention
    with torch.device("meta"), of_a_kind(cfg, task):
        model = getattr(transformers, task.model_class).from_config(config, **options)
    for part in model.modules():  # would look for padding among token ids that have no values
        if isinstance(part, transformers.PreTrainedModel):
            part.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
    linear_conv1d(model)
    freeze(model, HEADS if task.head else ())
    return model


def architecture(path: str) -> Any:
    """The transformers configuration of a checkpoint: of a local one its own, of a hub one what `SHAPES` has."""
    import transformers

    kind, _, name = path.partition(":")
    if kind == "random":
        text = {} if name == "vit" else {"vocab_size": 384}
        return transformers.AutoConfig.for_model({"deberta": "deberta-v2"}.get(name, name), **RANDOM[name], **text)
    if kind in ("embedded", "packaged"):
        from bench.embedded import materialise
        from bench.model import PACKAGED

        return transformers.AutoConfig.from_pretrained(materialise(name) if kind == "embedded" else PACKAGED / name)
    if path not in SHAPES:
        raise UnknownShape(f"{path}: bench/shapes.py does not know it; its models are {', '.join(SHAPES)}")
    return transformers.AutoConfig.for_model(**SHAPES[path])
