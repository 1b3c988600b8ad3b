"""Prefix tuning: trained keys and values in front of every layer's. Li and Liang, https://arxiv.org/abs/2101.00190"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, new_parameter, register, searched


class Prefix(nn.Module):
    """The prefix of one layer, (2, heads, length, size) for keys and values, trained itself (section 7.4)."""

    def __init__(self, like: nn.Module, heads: int, length: int, size: int):
        super().__init__()
        self.values = new_parameter(like, 2, heads, length, size)
        nn.init.normal_(self.values, std=0.02)

    def forward(self) -> Tensor:
        return self.values


class Trunk(nn.Module):
    """tanh(W1 P' + b1), (length, hidden): the part of the reparametrisation that all layers share (section 4.3)."""

    def __init__(self, like: nn.Module, length: int, size: int, hidden: int):
        super().__init__()
        self.tokens = new_parameter(like, length, size)
        self.first = new_parameter(like, hidden, size)
        self.first_bias = new_parameter(like, hidden)
        nn.init.normal_(self.tokens)
        nn.init.kaiming_uniform_(self.first, a=math.sqrt(5))

    def forward(self) -> Tensor:
        return F.linear(self.tokens, self.first, self.first_bias).tanh()


class Reparametrised(nn.Module):
    """The prefix of one layer as its slice of P = MLP(P')."""

    def __init__(self, trunk: Trunk, like: nn.Module, heads: int, size: int):
        super().__init__()
        self.trunk = trunk
        self.second = new_parameter(like, 2 * heads * size, len(trunk.first))
        self.second_bias = new_parameter(like, 2 * heads * size)
        nn.init.kaiming_uniform_(self.second, a=math.sqrt(5))
        self.heads = heads

    def forward(self) -> Tensor:
        flat = F.linear(self.trunk(), self.second, self.second_bias)
        return flat.view(len(flat), 2, self.heads, -1).permute(1, 2, 0, 3)


def prefix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over the prefix and the sequence; every query sees the whole prefix.

    The prefix joins after the cache, so that a cache holds the sequence only and positions stay the pretrained ones.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    front = module.prefix().to(key.dtype)[:, None].expand(-1, key.shape[0], -1, -1, -1)
    if attention_mask is None:
        attention_mask = _seen(query.shape[2], key, getattr(module, "is_causal", False))
    fill = attention_mask.dtype == torch.bool  # True is seen in a mask of bools, 0 in an additive one
    seen = attention_mask.new_full((*attention_mask.shape[:-1], front.shape[3]), fill)
    key, value = torch.cat([front[0], key], 2), torch.cat([front[1], value], 2)
    return sdpa_attention_forward(module, query, key, value, torch.cat([seen, attention_mask], -1), **kwargs)


def _seen(queries: int, key: Tensor, causal: bool) -> Tensor:
    """The mask (1, 1, queries, keys) that its absence stood for; torch's own causal flag would hide the prefix."""
    seen = torch.ones(1, 1, queries, key.shape[2], dtype=torch.bool, device=key.device)
    return seen.tril(key.shape[2] - queries) if causal and queries > 1 else seen


@register
@dataclass
class PrefixTuning(Method):
    """Equation 3: h_i = P[i] for the `length` activations in front, keys and values of every layer.

    `hidden` is the width of the reparametrisation's MLP, which is dropped after training; null trains P itself.
    The text keeps its pretrained positions, whereas a prefix in a key-value cache would move them by `length`.
    """

    lr: ClassVar[float] = 5e-5  # appendix A, table 6
    family: ClassVar[str] = "prompt"
    acts: ClassVar[str] = "keys and values of every layer"
    formula: ClassVar[str] = "2 L p d_kv stored; its MLP besides while training"
    neutral: ClassVar[bool] = False  # a prefix takes attention from the text at once

    length: int = searched(10, (5, 10, 20, 40))  # section 6.1, table-to-text; searched: around it
    hidden: int | None = 512

    def __post_init__(self) -> None:
        if self.length < 1 or (self.hidden is not None and self.hidden < 1):
            raise ValueError(f"method.length={self.length} and method.hidden={self.hidden} must be at least 1")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        attentions = _attentions(model)
        config: Any = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        trunk = Trunk(attentions[0], self.length, config.hidden_size, self.hidden) if self.hidden else None
        for attention in attentions:
            attention.prefix = (
                Reparametrised(trunk, attention, heads, size) if trunk else Prefix(attention, heads, self.length, size)
            )
        _attend_with_prefix(model)
        return model

    def finish(self, model: nn.Module) -> None:
        """Keep the prefix and drop the MLP that made it (section 4.3)."""
        for module in [m for m in model.modules() if isinstance(getattr(m, "prefix", None), Reparametrised)]:
            values = module.prefix().detach()  # type: ignore[operator]
            module.prefix = Prefix(module, values.shape[1], values.shape[2], values.shape[3])
            module.prefix.values.data.copy_(values)  # type: ignore[union-attr, operator]


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The self-attentions: the modules that hold the key layers. Raises `Unsupported` where none can be reached."""
    config: Any = model.config
    keys = [n for n, _ in model.named_modules() if re.search(role(model, "key"), n)]
    found = [model.get_submodule(n.rpartition(".")[0]) for n in keys]
    reachable = all(hasattr(m, "is_causal") and hasattr(m, "scaling") for m in found)
    if not found or not reachable or config.is_encoder_decoder:
        raise Unsupported(
            f"prefix tuning reaches a self-attention through transformers' attention interface, "
            f"and the one of {type(model).__name__} {'is encoder-decoder' if reachable else 'does not go through it'}"
        )
    return found


def _attend_with_prefix(model: Any) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("prefix", prefix_attention)
    AttentionMaskInterface.register("prefix", sdpa_mask)
    model.set_attn_implementation("prefix")
