"""VeRA: two trained vectors per layer scale random matrices that all share. Kopiczko et al., arxiv.org/abs/2310.11454"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted, Batch, Method, adapt_linears, new_parameter, placement, register, searched
from methods.rebuilt import Rebuilt


class Shared(nn.Module):
    """A frozen Kaiming-uniform matrix (rows, columns), held by all layers it fits and brought back by the run's seed.

    A module, not a tensor, so that it stays one when the model moves to another device or dtype.
    """

    values: Tensor

    def __init__(self, like: nn.Module, rows: int, columns: int):
        super().__init__()
        drawn = torch.empty(rows, columns, device="cpu")  # the same numbers from a seed on every device
        nn.init.kaiming_uniform_(drawn)
        self.register_buffer("values", drawn.to(**placement(like)), persistent=False)


class VeRALinear(Rebuilt):
    """Equation 2: h = W0 x + diag(b) B diag(d) A x with b (out,) and d (rank,) trained.

    For many rows (W0 + diag(b) B diag(d) A) x, which costs less at the paper's ranks. Both are W0 x to the bit at the start.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, A: Shared, B: Shared, d_initial: float, dropout: float):
        super().__init__(base)
        self.A, self.B = A, B
        self.b = new_parameter(base, base.out_features)
        self.d = new_parameter(base, len(A.values))
        nn.init.constant_(self.d, d_initial)
        self.dropout = nn.Dropout(dropout)

    def changed(self, b: Tensor, d: Tensor) -> Tensor:  # type: ignore[override]
        return self.base.weight.detach() + b[:, None] * (self.B.values @ (d[:, None] * self.A.values))

    def gradients(self, grad: Tensor, x: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        both = (grad.T @ x).to(b.dtype) @ self.A.values.T * self.B.values  # (out, rank)
        return both @ d, b @ both

    def forward(self, x: Tensor) -> Tensor:
        if not self.dropout.p and self.rebuilds(x, len(self.d), self.d.dtype):
            return self.product(x, self.b, self.d)
        y = self.base(x)
        inner = self.d * F.linear(self.dropout(x.to(self.d.dtype)), self.A.values)
        return y + (self.b * F.linear(inner, self.B.values)).to(y.dtype)

    def weight(self) -> Tensor:
        return self.base.weight + self.b[:, None] * self.B.values @ (self.d[:, None] * self.A.values)


@register
@dataclass
class VeRA(Method):
    """Vector-based random matrix adaptation of query and value (section 4.1, RoBERTa-base).

    Layers of one input width share A and layers of one output width share B, which is the paper's single pair where
    all layers are alike. The paper gives the head a learning rate of its own; here there is one for both.
    """

    lr: ClassVar[float] = 1e-2  # table 8, RoBERTa-base: 4e-3 or 1e-2 for the vectors
    family: ClassVar[str] = "low-rank"
    acts: ClassVar[str] = "weights of query and value"
    formula: ClassVar[str] = "r + m per layer"
    oracle: ClassVar[str] = "peft"
    mergeable: ClassVar[bool] = True

    rank: int = 1024
    d_initial: float = searched(0.1, (1e-7, 0.1, 1.0))
    dropout: float = 0.0
    targets: str = "query_value"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"method.rank={self.rank} must be at least 1")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        inner: dict[int, Shared] = {}
        outer: dict[int, Shared] = {}

        def layer(base: nn.Linear) -> Adapted:
            n, m = base.in_features, base.out_features
            A = inner[n] = inner.get(n) or Shared(base, self.rank, n)
            B = outer[m] = outer.get(m) or Shared(base, m, self.rank)
            return VeRALinear(base, A, B, self.d_initial, self.dropout)

        adapt_linears(model, self.targets, layer)
        return model
