"""VPT-shallow: trained tokens behind a ViT's class token, at its first layer. Jia et al., https://arxiv.org/abs/2203.12119"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, new_parameter, register, searched


class VisualPrompt(nn.Module):
    """P, (length, size), for the places 1 to `length` of the sequence: after the class token, before the patches."""

    def __init__(self, like: nn.Module, length: int, size: int, bound: float, dropout: float):
        super().__init__()
        self.values = new_parameter(like, length, size)
        nn.init.uniform_(self.values, -bound, bound)
        self.dropout = nn.Dropout(dropout)

    def around(self, x: Tensor, rest: int) -> Tensor:
        """Class token, prompts, and x from position `rest` on."""
        values = self.dropout(self.values).to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], values, x[:, rest:]], 1)

    def insert(self, embeddings: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        """Forward hook of the embeddings, whose output has its position embeddings already."""
        return self.around(x, 1)

    def replace(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of a layer: what the prompts before became is thrown away."""
        return self.around(inputs[0], 1 + len(self.values)), *inputs[1:]

    def drop(self, backbone: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook of the backbone: the head sees the class token and the patches."""
        x = output.last_hidden_state
        output.last_hidden_state = torch.cat([x[:, :1], x[:, 1 + len(self.values) :]], 1)
        return output


@register
@dataclass
class VPTShallow(Method):
    """VPT-shallow: [x0, P, E0] goes through all layers; the head reads the class token."""

    lr: ClassVar[float] = (
        1e-3  # our choice for AdamW; official tune_vtab.py searches SGD's 0.05 to 50, times batch size / 256
    )
    family: ClassVar[str] = "prompt"
    acts: ClassVar[str] = "the sequence of patches"
    formula: ClassVar[str] = "p d"
    neutral: ClassVar[bool] = False  # prompts take attention from the patches at once

    length: int = searched(50, (1, 5, 10, 50, 100, 200))  # the paper searches these; the code's default is 5
    dropout: float = 0.0  # searched: 0 or 0.1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"method.length={self.length} must be at least 1")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        backbone: Any = getattr(model, "base_model", None)
        embeddings: Any = getattr(backbone, "embeddings", None)
        if not hasattr(embeddings, "cls_token"):
            raise Unsupported(
                f"visual prompts stand behind the class token of a vision transformer, and {type(model).__name__} has none"
            )
        layers = [m for n, m in model.named_modules() if re.search(role(model, "layers"), n)]
        prompts = [self.prompt(backbone) for _ in self.prompted(layers)]
        for layer, prompt in zip(layers, prompts, strict=False):
            layer.prompt = prompt
            if layer is not layers[0]:
                layer.register_forward_pre_hook(prompt.replace)
        embeddings.register_forward_hook(prompts[0].insert)
        backbone.register_forward_hook(prompts[0].drop)
        return model

    def prompted(self, layers: list[nn.Module]) -> list[nn.Module]:
        """The layers that get prompts of their own."""
        return layers[:1]

    def prompt(self, backbone: Any) -> VisualPrompt:
        """One layer's prompts: uniform, after Xavier, as a projection from a patch to the width would start."""
        config = backbone.config
        bound = math.sqrt(6 / (config.num_channels * config.patch_size**2 + config.hidden_size))
        return VisualPrompt(backbone, self.length, config.hidden_size, bound, self.dropout)
