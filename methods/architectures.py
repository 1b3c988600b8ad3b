"""Which linear layer plays which part, per architecture, under the names of transformers 5.

A role is a regular expression over full module names. `role(model, "query_value")` is what a method asks; a name that
is no role is taken as a regular expression itself.
"""

from __future__ import annotations

from torch import nn

_BERT = dict(
    layers=r"encoder\.layer\.\d+$",
    query=r"attention\.self\.query$",
    key=r"attention\.self\.key$",
    value=r"attention\.self\.value$",
    attention_output=r"attention\.output\.dense$",
    mlp_input=r"intermediate\.dense$",
    mlp_output=r"layer\.\d+\.output\.dense$",
)
_LLAMA = dict(
    layers=r"layers\.\d+$",
    query=r"self_attn\.q_proj$",
    key=r"self_attn\.k_proj$",
    value=r"self_attn\.v_proj$",
    attention_output=r"self_attn\.o_proj$",
    mlp_input=r"mlp\.(gate|up)_proj$",
    mlp_output=r"mlp\.down_proj$",
)
ARCHITECTURES: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "deberta-v2": _BERT
    | dict(
        query=r"attention\.self\.query_proj$", key=r"attention\.self\.key_proj$", value=r"attention\.self\.value_proj$"
    ),
    "distilbert": dict(
        layers=r"transformer\.layer\.\d+$",
        query=r"attention\.q_lin$",
        key=r"attention\.k_lin$",
        value=r"attention\.v_lin$",
        attention_output=r"attention\.out_lin$",
        mlp_input=r"ffn\.lin1$",
        mlp_output=r"ffn\.lin2$",
    ),
    "vit": dict(
        layers=r"layers\.\d+$",
        query=r"attention\.q_proj$",
        key=r"attention\.k_proj$",
        value=r"attention\.v_proj$",
        attention_output=r"attention\.o_proj$",
        mlp_input=r"mlp\.fc1$",
        mlp_output=r"mlp\.fc2$",
    ),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": _LLAMA
    | dict(
        query=r"self_attn\.qkv_proj$",  # fused, as gate and up are
        key=r"self_attn\.qkv_proj$",
        value=r"self_attn\.qkv_proj$",
        mlp_input=r"mlp\.gate_up_proj$",
    ),
    "gpt2": dict(
        layers=r"h\.\d+$",
        query=r"attn\.c_attn$",  # query, key and value are one fused layer
        key=r"attn\.c_attn$",
        value=r"attn\.c_attn$",
        attention_output=r"attn\.c_proj$",
        mlp_input=r"mlp\.c_fc$",
        mlp_output=r"mlp\.c_proj$",
    ),
    "t5": dict(
        layers=r"block\.\d+$",
        query=r"Attention\.q$",
        key=r"Attention\.k$",
        value=r"Attention\.v$",
        attention_output=r"Attention\.o$",
        mlp_input=r"DenseReluDense\.wi(_[01])?$",
        mlp_output=r"DenseReluDense\.wo$",
    ),
    "sam2_hiera_det_model": dict(
        layers=r"blocks\.\d+$",
        query=r"attn\.qkv$",  # fused
        key=r"attn\.qkv$",
        value=r"attn\.qkv$",
        attention_output=r"attn\.proj$",
        mlp_input=r"mlp\.proj_in$",
        mlp_output=r"mlp\.proj_out$",
    ),
}
ARCHITECTURES["deit"] = ARCHITECTURES["vit"]
GROUPS = dict(
    query_value=("query", "value"),
    key_value=("key", "value"),
    attention=("query", "key", "value", "attention_output"),
    mlp=("mlp_input", "mlp_output"),
    all_linear=("query", "key", "value", "attention_output", "mlp_input", "mlp_output"),
)


def role(model: nn.Module, name: str) -> str:
    """The regular expression for a role or group of roles of this model; any other `name` is one itself.

    Raises `Unsupported` where the architecture is not in the table but a role was asked for.
    """
    from methods.base import Unsupported

    parts = GROUPS.get(name, (name,))
    if not set(parts) <= set(_BERT):
        return name
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise Unsupported(
            f"targets={name!r} is not known for the architecture {kind!r} (known: {known}); "
            "give method.targets as a regular expression over module names"
        )
    return "|".join(dict.fromkeys(ARCHITECTURES[kind][part] for part in parts))
