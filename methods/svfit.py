"""SVFit: only the leading singular values of each weight are trained. Sun et al., https://arxiv.org/abs/2409.05926"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Batch, Method, adapt_linears, new_parameter, register
from methods.pissa import principal
from methods.rebuilt import Rebuilt


class SVFitLinear(Rebuilt):
    """h = (U_r diag(sigma) V_r^T + W_e) x with sigma (rank,) trained from S_r, and the rest of W0 in W_e frozen.

    Written as W0 x + U_r diag(sigma - S_r) V_r^T x, or for many rows as (W0 + U_r diag(sigma - S_r) V_r^T) x: both are W0 x
    to the bit at the start.
    """

    base: nn.Linear
    U: Tensor
    Vh: Tensor
    start: Tensor

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__(base)
        U, S, Vh = principal(base.weight, min(rank, base.in_features, base.out_features))
        self.register_buffer("U", U, persistent=False)
        self.register_buffer("Vh", Vh, persistent=False)
        self.register_buffer("start", S, persistent=False)
        self.sigma = new_parameter(base, len(S))
        with torch.no_grad():
            self.sigma.copy_(S)

    def changed(self, sigma: Tensor) -> Tensor:  # type: ignore[override]
        return self.base.weight.detach() + self.U * (sigma - self.start) @ self.Vh

    def gradients(self, grad: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (((self.U.T @ (grad.T @ x).to(sigma.dtype)) * self.Vh).sum(1),)

    def forward(self, x: Tensor) -> Tensor:
        if self.rebuilds(x, len(self.sigma), self.sigma.dtype):
            return self.product(x, self.sigma)
        y = self.base(x)
        inner = F.linear(x.to(self.sigma.dtype), self.Vh) * (self.sigma - self.start)
        return y + F.linear(inner, self.U).to(y.dtype)

    def weight(self) -> Tensor:
        return self.base.weight + self.U * (self.sigma - self.start) @ self.Vh


@register
@dataclass
class SVFit(Method):
    """A layer with fewer than `rank` singular values trains all of them. Weight decay pulls the values themselves."""

    lr: ClassVar[float] = 1e-2  # our choice: no recipe is released
    family: ClassVar[str] = "low-rank"
    acts: ClassVar[str] = "singular values of query and value"
    formula: ClassVar[str] = "r per layer"
    mergeable: ClassVar[bool] = True

    rank: int = 768  # 16 times fewer than LoRA of rank 8 in a model 768 wide, as in the abstract
    targets: str = "query_value"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"method.rank={self.rank} must be at least 1")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        adapt_linears(model, self.targets, lambda base: SVFitLinear(base, self.rank))
        return model
