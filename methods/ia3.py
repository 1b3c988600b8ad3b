"""(IA)3: trained vectors rescale keys, values and the FFN's inner activation. Liu et al., arxiv.org/abs/2205.05638"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from methods.architectures import role
from methods.base import Adapted, Batch, Method, adapt_linears, new_parameter, register


class ScaledInput(Adapted):
    """W (l * x) + b: the inner activation of the FFN, rescaled where the down projection reads it."""

    base: nn.Linear

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        self.scale = new_parameter(base, base.in_features)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.base((x * self.scale).to(x.dtype))

    def weight(self) -> Tensor:
        return self.base.weight * self.scale


class ScaledOutput(Adapted):
    """l * (W x + b). In a layer that makes query, key and value at once, the first `skip` outputs stay as they are."""

    base: nn.Linear

    def __init__(self, base: nn.Linear, skip: int = 0):
        super().__init__(base)
        self.scale = new_parameter(base, base.out_features - skip)
        self.skip = skip
        nn.init.ones_(self.scale)

    def full(self) -> Tensor:
        return F.pad(self.scale, (self.skip, 0), value=1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y * self.full()).to(y.dtype)

    def weight(self) -> Tensor:
        return self.base.weight * self.full()[:, None]

    def bias(self) -> Tensor | None:
        bias = self.base.bias
        return None if bias is None else (bias * self.full()).to(bias.dtype)


@register
@dataclass
class IA3(Method):
    """Section 3.3: softmax(Q (l_k * K)^T) (l_v * V) and (l_ff * f(W1 x)) W2, all vectors start at one."""

    lr: ClassVar[float] = 3e-3  # section 3.5, T-Few (there with Adafactor)
    family: ClassVar[str] = "scale"
    acts: ClassVar[str] = "keys, values, inner activation of the FFN"
    formula: ClassVar[str] = "L (2 d_kv + f)"
    oracle: ClassVar[str] = "peft"
    mergeable: ClassVar[bool] = True

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        share = queries(model)
        adapt_linears(model, "mlp_output", ScaledInput)
        adapt_linears(model, "key_value", lambda base: ScaledOutput(base, int(share * base.out_features)))
        return model


def queries(model: nn.Module) -> Fraction:
    """Which share of a layer's first outputs are queries, where it makes keys and values too; 0 where it does not."""
    if role(model, "query") != role(model, "key"):
        return Fraction(0)
    heads = getattr(model.config, "num_attention_heads", 1)
    groups = getattr(model.config, "num_key_value_heads", None) or heads
    return Fraction(heads, heads + 2 * groups)
