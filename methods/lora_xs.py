"""LoRA-XS: an r x r matrix between frozen singular factors. Bałazy et al., https://arxiv.org/abs/2405.17604"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted, new_parameter, register
from methods.lora import LoRA
from methods.pissa import principal


class LoRAXSLinear(Adapted):
    """h = W0 x + s B R A x with R (rank, rank) trained, A = S_r V_r^T and B = U_r frozen, W0 = U S V^T.

    The paper writes W0 as (in, out), so that its U_r S_r is on the side of the input, as in the released code; `peft`
    (PSOFT) puts S_r on the side of the output.
    """

    base: nn.Linear
    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float, init_std: float):
        super().__init__(base)
        U, S, Vh = principal(base.weight, rank)
        self.register_buffer("A", S[:, None] * Vh, persistent=False)
        self.register_buffer("B", U, persistent=False)
        self.R = new_parameter(base, rank, rank)
        nn.init.normal_(self.R, std=init_std)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        inner = F.linear(F.linear(self.dropout(x.to(self.R.dtype)), self.A), self.R)
        return y + F.linear(inner * self.scale, self.B).to(y.dtype)

    def weight(self) -> Tensor:
        return self.base.weight + self.scale * self.B @ self.R @ self.A


@register
@dataclass
class LoRAXS(LoRA):
    """Low-rank adaptation with extremely few parameters, which do not depend on the width of the model.

    On the layers of `lora` so that the two compare; the paper also adapts the attention's and the FFN's output.
    """

    lr: ClassVar[float] = 1e-3  # scripts/run_glue.py, RoBERTa-large: 1e-4 to 1e-3, with a rate of its own for the head
    formula: ClassVar[str] = "r^2 per layer"
    neutral: ClassVar[bool] = False  # R is drawn, at 1e-5

    rank: int = 25  # the largest of the paper's GLUE runs
    alpha: float = 16.0
    init_std: float = 1e-5

    def layer(self, base: nn.Linear) -> Adapted:
        return LoRAXSLinear(base, self.rank, self.scale, self.dropout, self.init_std)
