"""Scaled parallel adapter: a bottleneck beside each FFN. He et al., https://arxiv.org/abs/2110.04366"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, register, searched
from methods.houlsby import Bottleneck, check_bottleneck


class ScaledBottleneck(Bottleneck):
    """s (W_u f(W_d x + b_d) + b_u) with the start of LoRA: W_d Kaiming uniform, all else zero."""

    def __init__(self, like: nn.Module, size: int, width: int, activation: str, scale: float):
        super().__init__(like, size, width, activation)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def beside(ffn: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook of a module that is the whole FFN: FFN(x) + A(x)."""
    return output + ffn.adapter(inputs[0]).to(output.dtype)


def beside_residual(output: Any, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Forward pre-hook of BERT's output module, LN(W2 h + x), where x is the FFN's input: x becomes x + A(x)."""
    h, x = inputs
    return h, x + output.adapter(x).to(x.dtype)


@register
@dataclass
class ParallelAdapter(Method):
    """Table 2, "scaled parallel adapter": h <- h + s f(x W_down) W_up, x the input of the FFN and h its output."""

    lr: ClassVar[float] = 1e-4  # appendix A.2, MNLI and SST-2
    family: ClassVar[str] = "adapter"
    acts: ClassVar[str] = "beside the FFN"
    formula: ClassVar[str] = "L (2 d b + b + d)"

    width: int = 512  # section 4.6; the paper's small setting for classification is 16
    scale: float = searched(4.0, (1.0, 2.0, 4.0, 8.0))  # section 4.5; searched: around it
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_bottleneck(self.width, self.activation)

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        whole, ends = (_parents(model, role(model, part)) for part in ("mlp_input", "mlp_output"))
        if not ends:
            raise Unsupported(f"{type(model).__name__} has no FFN under the names of its architecture")
        size: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        for name in ends:
            module = model.get_submodule(name)
            module.adapter = ScaledBottleneck(module, size, self.width, self.activation, self.scale)
            if name in whole:
                module.register_forward_hook(beside)
            else:
                module.register_forward_pre_hook(beside_residual)
        return model


def _parents(model: nn.Module, pattern: str) -> list[str]:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, n)]
    return [n.rpartition(".")[0] for n in names]
