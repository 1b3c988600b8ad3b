"""LoRA: a trained low-rank change to each target weight. Hu et al., https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted, Batch, Method, adapt_linears, new_parameter, register

BIASES = ("none", "all", "lora_only")


class LoRALinear(Adapted):
    """Equation 3: h = W0 x + s B A x with A (rank, in), Kaiming uniform, and B (out, rank), zero."""

    base: nn.Linear

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base)
        self.A = new_parameter(base, rank, base.in_features)
        self.B = new_parameter(base, base.out_features, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def change(self, x: Tensor) -> Tensor:
        """B s A x, (..., in) to (..., out), in the dtype of A and B: the change of weight is never built, s is on r numbers."""
        return F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A) * self.scale, self.B)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.change(x).to(y.dtype)

    def weight(self) -> Tensor:
        return self.base.weight + self.scale * self.B @ self.A


@register
@dataclass
class LoRA(Method):
    """Low-rank adaptation of the attention's query and value (section 4.2; RoBERTa-base of table 9).

    `rslora` scales by alpha / sqrt(rank) (Kalajdzievski, https://arxiv.org/abs/2312.03732) instead of alpha / rank.
    `bias` trains biases beside the factors: `none`, `all`, or `lora_only` for those of the adapted layers.
    """

    lr: ClassVar[float] = 5e-4  # table 9, RoBERTa-base: 4e-4 or 5e-4
    family: ClassVar[str] = "low-rank"
    acts: ClassVar[str] = "weights of query and value"
    formula: ClassVar[str] = "r (m + n) per layer"
    oracle: ClassVar[str] = "peft"
    mergeable: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0  # of the released scripts, which made the table; the table prints 8
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    targets: str = "query_value"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"method.rank={self.rank} must be at least 1")
        if self.bias not in BIASES:
            raise ValueError(f"method.bias={self.bias!r}: the options are {', '.join(BIASES)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def layer(self, base: nn.Linear) -> Adapted:
        """What takes the place of a target layer; the one thing that variants of LoRA change."""
        return LoRALinear(base, self.rank, self.scale, self.dropout)

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        names = adapt_linears(model, self.targets, self.layer)
        if self.bias != "none":
            ends = ("bias",) if self.bias == "all" else tuple(f"{name}.base.bias" for name in names)
            for name, p in model.named_parameters():
                p.requires_grad_(p.requires_grad or name.endswith(ends))
        return model
