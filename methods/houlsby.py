"""Houlsby adapters: a bottleneck after attention and one after the FFN. Houlsby et al., arxiv.org/abs/1902.00751"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from methods.architectures import role
from methods.base import Adapted, Batch, Method, adapt_linears, new_parameter, register, searched

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Bottleneck(nn.Module):
    """W_u f(W_d x + b_d) + b_u, (..., size) to the same shape, without the skip connection, in its own dtype."""

    def __init__(self, like: nn.Module, size: int, width: int, activation: str):
        super().__init__()
        self.down = new_parameter(like, width, size)
        self.down_bias = new_parameter(like, width)
        self.up = new_parameter(like, size, width)
        self.up_bias = new_parameter(like, size)
        self.activation = ACTIVATIONS[activation]

    def start(self, std: float) -> Bottleneck:
        """Normal weights, truncated at two standard deviations, and zero biases; return itself."""
        for p in (self.down, self.up):
            nn.init.trunc_normal_(p).data.mul_(std)
        return self

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(F.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return F.linear(inner, self.up, self.up_bias)


class SerialAdapter(Adapted):
    """h + W_u f(W_d h) on the output h of a layer, before the residual connection (figure 2)."""

    def __init__(self, base: nn.Linear, width: int, activation: str, init_std: float):
        super().__init__(base)
        self.adapter = Bottleneck(base, base.out_features, width, activation).start(init_std)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.adapter(y).to(y.dtype)


def check_bottleneck(width: int, activation: str) -> None:
    """Raise ValueError for a size or an activation that no adapter can have."""
    if width < 1:
        raise ValueError(f"method.width={width} must be at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"method.activation={activation!r}: the options are {', '.join(ACTIVATIONS)}")


@register
@dataclass
class Houlsby(Method):
    """Two bottleneck adapters per block, and the LayerNorms (section 2.1).

    An adapter stands directly behind the projection; the paper's code has the block's dropout between the two, which
    is the same function at dropout 0 and in evaluation.
    """

    lr: ClassVar[float] = 3e-4  # section 3.1, chosen from 3e-5, 3e-4, 3e-3
    family: ClassVar[str] = "adapter"
    acts: ClassVar[str] = "after attention and after the FFN"
    formula: ClassVar[str] = "L (4 d b + 2 b + 2 d) + norms"
    neutral: ClassVar[bool] = False  # near the pretrained model: weights of standard deviation `init_std`

    width: int = searched(64, (8, 64, 256))  # section 3.1: 8, 64 or 256
    activation: str = "gelu"
    init_std: float = 1e-2  # section 3.6
    layer_norm: bool = True  # train the norms too, 2 d parameters each

    def __post_init__(self) -> None:
        check_bottleneck(self.width, self.activation)

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        targets = f"{role(model, 'attention_output')}|{role(model, 'mlp_output')}"
        adapt_linears(model, targets, lambda base: SerialAdapter(base, self.width, self.activation, self.init_std))
        if self.layer_norm:
            for norm in [m for m in model.modules() if type(m).__name__.endswith("Norm")]:
                norm.requires_grad_()
        return model
