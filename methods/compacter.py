"""Compacter: Houlsby's adapters as sums of Kronecker products. Karimi Mahabadi et al., https://arxiv.org/abs/2106.04647"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from methods.architectures import role
from methods.base import Adapted, Batch, Method, Unsupported, adapt_linears, new_parameter, register, searched
from methods.houlsby import ACTIVATIONS, SerialAdapter, check_bottleneck


class LPHMLinear(nn.Module):
    """Equation 5: x -> x W + b with W = sum over i <= n of A_i (n, n) kron s_i t_i^T, (in / n, out / n).

    `A` is (n, n, n), one and the same parameter in all layers. W, (in, out), is never built.
    """

    def __init__(self, A: nn.Parameter, like: nn.Module, inner: int, outer: int):
        super().__init__()
        n = len(A)
        self.A = A
        self.s = new_parameter(like, n, inner // n)
        self.t = new_parameter(like, n, outer // n)
        self.bias = new_parameter(like, outer)
        for p, fan in ((self.s, inner // n), (self.t, outer // n)):
            bound = (12 / (fan + 1)) ** 0.5  # Glorot uniform of a column or row of length `fan`, with gain sqrt(2)
            nn.init.uniform_(p, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (len(self.A), -1))  # (..., n, in / n)
        inner = torch.einsum("...ai,iac->...ci", parts @ self.s.T, self.A)  # (..., n, n)
        return (inner @ self.t).flatten(-2) + self.bias


class PHMBottleneck(nn.Module):
    """W_u f(W_d x + b_d) + b_u with both projections of the form above."""

    def __init__(self, A: nn.Parameter, like: nn.Module, size: int, width: int, activation: str):
        super().__init__()
        self.down, self.up = LPHMLinear(A, like, size, width), LPHMLinear(A, like, width, size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x.to(self.down.s.dtype))))


class CompacterLayer(SerialAdapter):
    """h + A(h) on the output h of a layer, before the residual connection, as Houlsby's."""

    def __init__(self, base: nn.Linear, adapter: PHMBottleneck):
        Adapted.__init__(self, base)
        self.adapter = adapter  # type: ignore[assignment]


@register
@dataclass
class Compacter(Method):
    """Low-rank parametrised hypercomplex adapters behind self-attention and FFN, and the norms (sections 3.2 and 4).

    `plus` is Compacter++, behind the FFN alone. The start is that of the official code, whose GELU is the
    approximation by tanh; ours is exact.
    """

    lr: ClassVar[float] = 3e-3  # official config for T5-base
    family: ClassVar[str] = "adapter"
    acts: ClassVar[str] = "behind self-attention and FFN; norms"
    formula: ClassVar[str] = "n^3 + 6 L (d + b), and the norms"
    neutral: ClassVar[bool] = False  # near the pretrained model: A of standard deviation `init_std`

    reduction: int = searched(32, (8, 16, 32))  # width of the bottleneck is d / reduction; the paper searches 8, 16, 32
    n: int = 4  # searched: 4, 8, 12
    activation: str = "gelu"
    init_std: float = 1e-4  # of A
    layer_norm: bool = True
    plus: bool = False

    def __post_init__(self) -> None:
        check_bottleneck(self.reduction, self.activation)
        if self.n < 1:
            raise ValueError(f"method.n={self.n} must be at least 1")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        where = (
            role(model, "mlp_output") if self.plus else f"{role(model, 'attention_output')}|{role(model, 'mlp_output')}"
        )
        like = next(m for m in model.modules() if isinstance(m, nn.Linear))
        A = new_parameter(like, self.n, self.n, self.n)
        nn.init.normal_(A, std=self.init_std)
        adapt_linears(model, rf"^(?!.*EncDecAttention).*?(?:{where})", lambda base: self.layer(base, A))
        if self.layer_norm:
            for norm in [m for m in model.modules() if type(m).__name__.endswith("Norm")]:
                norm.requires_grad_()
        return model

    def layer(self, base: nn.Linear, A: nn.Parameter) -> CompacterLayer:
        size = base.out_features
        width = size // self.reduction
        if not width or size % self.n or width % self.n:
            raise Unsupported(
                f"method.n={self.n} must divide the width {size} and its method.reduction={self.reduction}th part {width}; "
                "choose another of the two"
            )
        return CompacterLayer(base, PHMBottleneck(A, base, size, width, self.activation))
