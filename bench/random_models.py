"""Tiny models with random weights, of any architecture: for tests only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench.model import UnknownModel, freeze, linear_conv1d

if TYPE_CHECKING:
    from tasks import Task

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
_QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
RANDOM: dict[str, dict[str, Any]] = {
    "bert": TINY | _QUIET,
    "roberta": TINY | _QUIET | dict(max_position_embeddings=514),
    "deberta": TINY | _QUIET | dict(pooler_hidden_size=32, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "distilbert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
    "vit": TINY | _QUIET | dict(image_size=16, patch_size=8),
    "deit": TINY | _QUIET | dict(image_size=16, patch_size=8, architectures=["DeiTForImageClassification"]),
    "llama": TINY | dict(num_key_value_heads=2, max_position_embeddings=512),
    "qwen2": TINY | dict(num_key_value_heads=2, max_position_embeddings=512),
    "phi3": TINY | dict(num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=512),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "t5": dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0),
}  # fmt: skip
_DECODERS = ("llama", "qwen2", "phi3", "gpt2")
_IMAGES = ("vit", "deit")
HEADS = ("classifier", "score", "pre_classifier", "pooler", "classification_head")  # of models without a checkpoint


def random_model(kind: str, num_labels: int = 2, seed: int = 0, model_class: str | None = None) -> nn.Module:
    """A tiny model of architecture `kind` with random weights, in eval mode, frozen but for its head. For tests only.

    32 wide, 2 layers, 4 heads (2 for keys and values where grouped), byte vocabulary of 384, images of 16 x 16.
    Decoders get their language-model head, encoders and ViTs a classifier, unless `model_class` says otherwise.
    """
    import transformers

    name = {"deberta": "deberta-v2"}.get(kind, kind)
    text = {} if kind in _IMAGES else dict(vocab_size=384, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    config = transformers.AutoConfig.for_model(name, **RANDOM[kind], **text, num_labels=num_labels)
    auto = model_class or (
        "AutoModelForCausalLM" if kind in _DECODERS
        else "AutoModelForImageClassification" if kind in _IMAGES
        else "AutoModelForSeq2SeqLM" if kind == "t5"
        else "AutoModelForSequenceClassification"
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(config).eval()
        for p in [p for p in model.parameters() if p.ndim == 3 and not p.any()]:  # DeiT's tokens and positions, which
            nn.init.normal_(p, std=0.02)  # as zeros give its first norm infinitely steep gradients
    linear_conv1d(model)
    freeze(model, HEADS if num_labels and not auto.endswith("LM") else ())
    return model


def random_pair(kind: str, task: Task) -> tuple[nn.Module, Any]:
    """A random model with the head of `task`, drawn from torch's global generator, and a byte tokenizer or image processor."""
    if kind not in RANDOM:
        raise UnknownModel(f"model.path='random:{kind}': the random architectures are {', '.join(RANDOM)}")
    seed = int(torch.randint(2**31, ()))
    labels = task.options().get("num_labels", 0)
    model = random_model(kind, labels, seed, task.model_class)
    for key, value in task.options().items():
        setattr(model.config, key, value)
    if task.kind == "image":
        from transformers import AutoImageProcessor  # noqa: F401
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        return model, ViTImageProcessorPil(size={"height": 16, "width": 16})
    from transformers import ByT5Tokenizer

    return model, ByT5Tokenizer(model_max_length=512)
