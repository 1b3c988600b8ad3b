"""AdaptFormer: a scaled bottleneck beside each FFN of a vision transformer. Chen et al., arxiv.org/abs/2205.13535"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, register, searched
from methods.houlsby import check_bottleneck
from methods.parallel_adapter import ScaledBottleneck

NORMS = (
    "layernorm_after",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "layer_norm2",
    "layer_norm",
)


class AdaptMLP(ScaledBottleneck):
    """s ReLU(W_d x' + b_d) W_u + b_u of the residual stream x', (..., size), which the FFN reads behind a norm."""

    def __init__(self, like: nn.Module, size: int, width: int, scale: float, dropout: float):
        super().__init__(like, size, width, "relu", scale)
        self.activation = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
        self.stream: list[Tensor] = []

    def read(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the norm before the FFN: keep x' for `add`."""
        self.stream.append(inputs[0])

    def add(self, ffn: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Forward hook of the FFN: MLP(LN(x')) + A(x'), to which the block adds x'."""
        return output + self(self.stream.pop()).to(output.dtype)


@register
@dataclass
class AdaptFormer(Method):
    """The map of the official code: A reads x' as it is, where the paper writes LN(x').

    The dropout between the projections is the code's too. A block without a norm right before its FFN (BERT) has no
    such x': there it would be `parallel_adapter` with another scale.
    """

    lr: ClassVar[float] = 1e-3  # of AdamW in PETL-ViT; the official code trains with SGD at 0.1 x batch size / 256
    family: ClassVar[str] = "adapter"
    acts: ClassVar[str] = "beside the FFN"
    formula: ClassVar[str] = "L (2 d b + b + d)"

    width: int = 64  # this, scale and dropout: official code
    # section 4.1; searched: the grid of the VTAB study that selects on val
    scale: float = searched(0.1, (0.05, 0.1, 0.2))
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_bottleneck(self.width, "relu")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        inner = [n for n, _ in model.named_modules() if re.search(role(model, "mlp_input"), n)]
        for name in dict.fromkeys(n.rpartition(".")[0] for n in inner):
            block, ffn = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
            norm = next((getattr(block, n) for n in NORMS if hasattr(block, n)), None)
            if norm is None:
                raise Unsupported(
                    f"{type(model).__name__} normalises after its FFN, so there is no un-normalised input for "
                    "AdaptFormer to read; parallel_adapter is the same map there"
                )
            size = norm.weight.shape[0]
            ffn.adapter = adapter = AdaptMLP(ffn, size, self.width, self.scale, self.dropout)
            norm.register_forward_pre_hook(adapter.read)
            ffn.register_forward_hook(adapter.add)
        return model
