"""Padding-free batches: between its embeddings and its head, a model computes real tokens alone.

Before the first block the hidden states (rows, width, d) become (1, T, d), the T real tokens one row behind the other;
behind the last block, or the norm that ends the stack, they are rows again, zeros on padding. Linear layers, norms,
activations and whatever a method put there see tokens; attention alone looks at rows (`attend`), so that none sees
another. Embeddings, masks, pooler, head, loss and tasks stay as they are; logits and gradients do up to rounding. With
dropout the two differ as two seeds do: for fewer numbers other masks are drawn. What has a key-value cache, which
generation has, is padded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from bench.layout import Layout, as_rows, current, running
from methods.architectures import role
from methods.base import Unsupported
from methods.ladder import last_norm

POSITIONS = ("position_embeddings", "position_ids")  # what blocks are given beside hidden states and mask
NAME = "packed_{}"  # of an attention function, by that of the one it packs for


def install(model: nn.Module, layout_of: Callable[..., Layout | None] = Layout.of) -> ExitStack:
    """Let every forward of `model` that has padding run packed, until the result is closed. Raises `Unsupported`, with the reason."""
    blocks, end, backbone = stack(model)
    undo = ExitStack()
    _attend_packed(model, undo)
    backbone.forward = packing(backbone.forward, layout_of)  # type: ignore[method-assign]
    undo.callback(delattr, backbone, "forward")
    undo.callback(blocks[0].register_forward_pre_hook(_begin, prepend=True).remove)
    undo.callback(end.register_forward_hook(_end).remove)
    for block in blocks:
        undo.callback(block.register_forward_pre_hook(_position, with_kwargs=True, prepend=True).remove)
    return undo


def stack(model: nn.Module) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """The blocks, the module that ends them, and the backbone, which is given the mask. Raises `Unsupported`."""
    from transformers import PreTrainedModel

    config: Any = model.config
    if config.is_encoder_decoder:
        raise Unsupported(f"{type(model).__name__} is an encoder-decoder")
    names, keys = (
        [n for n, _ in model.named_modules() if re.search(role(model, part), n)] for part in ("layers", "key")
    )
    attentions = [model.get_submodule(n.rpartition(".")[0]) for n in keys]
    if not attentions or not all(hasattr(m, "is_causal") and hasattr(m, "scaling") for m in attentions):
        raise Unsupported(f"{type(model).__name__} does not attend through transformers' attention interface")
    parts = names[0].split(".")[:-2]  # "roberta.encoder" of "roberta.encoder.layer.0"
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts), -1, -1)]
    backbone = next(m for m in around if isinstance(m, PreTrainedModel))
    end = around[0] if around[0] is not backbone else last_norm(backbone)
    if end is None:
        raise Unsupported(f"nothing is known to end the blocks of {type(backbone).__name__}")
    return [model.get_submodule(n) for n in names], end, backbone


def packing(inner: Callable[..., Any], layout_of: Callable[..., Layout | None] = Layout.of) -> Callable[..., Any]:
    """A backbone's `forward` that knows the layout of its mask."""

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        asked = ("use_cache", "output_hidden_states", "output_attentions")
        if mask is None or mask.dim() != 2 or kwargs.get("past_key_values") is not None or any(map(kwargs.get, asked)):
            layout = None
        else:
            layout = layout_of(mask, getattr(mask, "host", None))
        with running(layout):
            return inner(*args, **kwargs)

    forward.packs = True  # type: ignore[attr-defined]
    return forward


def _begin(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of the first block."""
    layout = current()
    return args if layout is None else (layout.pack(args[0]), *args[1:])


def _position(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a block."""
    if (layout := current()) is not None:
        kwargs = kwargs | {name: layout.like(kwargs[name]) for name in POSITIONS if name in kwargs}
    return args, kwargs


def _end(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of what ends the stack."""
    if isinstance(output, Tensor):
        return as_rows(output)
    output.last_hidden_state = as_rows(output.last_hidden_state)
    return output


HOOKS = (_begin, _position, _end)


def _attend_packed(model: nn.Module, undo: ExitStack) -> None:
    """Put `attend` before the attention function that the model has, wherever it is named."""
    from transformers import AttentionInterface, PreTrainedConfig
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    names: dict[int, Any] = {key: config._attn_implementation for key, config in configs.items()}
    if unknown := [name for name in names.values() if ALL_MASK_ATTENTION_FUNCTIONS.get(name) is not sdpa_mask]:
        raise Unsupported(f"model.attention={unknown[0]} is not given masks of rows, as sdpa is")
    for key, config in configs.items():
        packed = NAME.format(names[key])
        AttentionInterface.register(packed, partial(attend, ALL_ATTENTION_FUNCTIONS[names[key]]))
        AttentionMaskInterface.register(packed, sdpa_mask)
        undo.callback(setattr, config, "_attn_implementation", names[key])
        config._attn_implementation = packed


def attend(
    inner: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function `inner` on packed query, key and value (1, heads, T, size), row by row: (1, T, heads, size).

    Neighbouring rows of one length attend together, as views and without a mask; or all rows under the model's mask.
    """
    layout = current()
    if layout is None:
        return inner(module, query, key, value, mask, **kwargs)
    tokens = [t.transpose(1, 2) for t in (query, key, value)]
    if together(query, layout, kwargs.get("sliding_window")):
        rows = [layout.unpack(t).transpose(1, 2) for t in tokens]
        return layout.pack(inner(module, *rows, mask, **kwargs)[0]), None
    sizes = [rows * length for rows, length in layout.groups]
    found = []
    for group, *parts in zip(layout.groups, *(t[0].split(sizes) for t in tokens), strict=True):
        alike = [part.unflatten(0, group).transpose(1, 2) for part in parts]
        found.append(inner(module, *alike, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(found)[None], None


def together(query: Tensor, layout: Layout, window: int | None) -> bool:
    """Whether all rows attend at once, padded: on a GPU, where many small kernels cost more, and in a window within a row."""
    return query.is_cuda or layout.at_once or (window is not None and max(layout.lengths) > window)
