"""Llama-shaped models to train: by our methods, and as peft's users do."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from methods import METHODS, Unsupported

if TYPE_CHECKING:
    from benchmarks.memory import Shape

HEAD = 128  # width of an attention head
OURS = (
    "full_ft",
    "galore",
    "lisa",
    "mezo",
    "lora",
    "dora",
    "ia3",
    "qlora",
    "qlora_plain",
    "qlora_8bit",
    "prompt_tuning",
    "lst",
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora_plain": ("qlora", {"dropout": 0.0}),
    "qlora_8bit": ("qlora", {"dropout": 0.0, "bits": 8}),
}
QLORA = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}  # as ours
PEFT: dict[str, tuple[str, dict[str, Any]]] = {  # a tuner and its fields
    "LORA": ("LORA", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "DORA": ("LORA", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "IA3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "PROMPT_TUNING": ("PROMPT_TUNING", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20}),
    "QLORA": ("LORA", QLORA),
    "QLORA_FP32": ("LORA", QLORA),  # after `prepare_model_for_kbit_training`: in float32 what is not packed
}
Method = Callable[[nn.Module], "tuple[nn.Module, Any]"]  # a pretrained model to the one to train, and who made it


def pretrained(shape: Shape, device: str, *, checkpointing: bool = False) -> Any:
    """A frozen model of zeros."""
    import transformers

    d = int(shape.d)
    config = transformers.LlamaConfig(
        vocab_size=int(shape.V), hidden_size=d, intermediate_size=d * 7 // 2, num_hidden_layers=int(shape.L),
        num_attention_heads=d // HEAD, num_key_value_heads=d // HEAD // 4, head_dim=HEAD, pad_token_id=0,
        max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if device != "meta":
        model.to_empty(device=device)
        for t in (*model.parameters(), *model.buffers()):
            t.detach().zero_()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False)


def ours(name: str) -> Method:
    def apply(model: nn.Module) -> tuple[nn.Module, Any]:
        of, fields = VARIANTS.get(name, (name, {}))
        method = METHODS[of](**fields)
        return method.apply(model, iter(())), method

    return apply


def theirs(kind: str) -> Method:
    def apply(model: Any) -> tuple[nn.Module, Any]:
        import peft

        if "QLORA" in kind:
            model = packed(model)
        if kind == "QLORA_FP32":
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        tuner, fields = PEFT[kind]
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[tuner]](**fields)
        return peft.get_peft_model(model, config), METHODS["lora"]()  # AdamW, no penalty

    return apply


def packed(model: Any) -> Any:
    """The linear layers of the blocks in bitsandbytes' 4 bits, as QLoRA keeps them: NF4, its scales in 8 bits."""
    if find_spec("bitsandbytes") is None:
        raise Unsupported("not here: bitsandbytes is not installed")
    from bitsandbytes import functional
    from bitsandbytes import nn as layers

    with torch.device("cpu"):  # the code book of the scales is computed, which the meta device does not do
        functional.name2qmap["dynamic"] = functional.create_dynamic_map().to(model.device)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            codes, state = functional.quantize_4bit(linear.weight, compress_statistics=True, quant_type="nf4")
            shape = linear.in_features, linear.out_features
            layer = layers.Linear4bit(*shape, bias=False, compute_dtype=linear.weight.dtype, device="meta")
            layer.weight = layers.Params4bit(codes, quant_state=state, quant_type="nf4", bnb_quantized=True)
            model.model.layers.set_submodule(name, layer)
    model.is_loaded_in_4bit = True
    return model
