"""Pfeiffer adapters: one bottleneck per block, after the FFN. Pfeiffer et al., https://arxiv.org/abs/2005.00052"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from methods.architectures import role
from methods.base import Adapted, Batch, Method, Unsupported, register, searched
from methods.houlsby import Bottleneck, check_bottleneck

POST_NORM = r"layer\.\d+\.(output\.LayerNorm|output_layer_norm)$"  # where a block ends in a norm: BERT and its heirs


class AdaptedNorm(Adapted):
    """LN(s + A(LN(s))), where s = FFN output + residual: equation 1 of the paper inside a post-norm block."""

    def __init__(self, base: nn.Module, adapter: Bottleneck):
        super().__init__(base)
        self.adapter = adapter

    def forward(self, s: Tensor) -> Tensor:
        return self.base(s + self.adapter(self.base(s)).to(s.dtype))


def add_adapter(block: Any, inputs: Any, output: Any) -> Any:
    """Forward hook of a pre-norm block, whose output is already s: s + A(s)."""
    s = output[0] if isinstance(output, tuple) else output
    adapted = s + block.adapter(s).to(s.dtype)
    return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


@register
@dataclass
class Pfeiffer(Method):
    """A(h) = U relu(D h) on the block's output after its residual and norm, added to the FFN output, normed again.

    This is the placement of the paper (section 4.2) and of the authors' own package (`SeqBnConfig`: the original norm
    before and after, the residual taken before it). Blocks without a norm at their end keep the residual stream.
    """

    lr: ClassVar[float] = 1e-4  # section 5.3, language and task adapters
    family: ClassVar[str] = "adapter"
    acts: ClassVar[str] = "after the FFN"
    formula: ClassVar[str] = "L (2 d b + b + d)"
    neutral: ClassVar[bool] = False  # near the pretrained model: weights of standard deviation `init_std`

    # a sixteenth of 768, the reduction factor of task adapters; searched: a quarter, four times
    width: int = searched(48, (12, 48, 192))
    activation: str = "relu"
    init_std: float = 1e-2

    def __post_init__(self) -> None:
        check_bottleneck(self.width, self.activation)

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        blocks = {n: m for n, m in model.named_modules() if re.search(role(model, "layers"), n)}
        norms = {n: m for n, m in model.named_modules() if re.search(POST_NORM, n)}
        if not blocks:
            raise Unsupported(f"{type(model).__name__} has no blocks under the names of its architecture")
        size: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        for name, module in (norms or blocks).items():
            adapter = Bottleneck(module, size, self.width, self.activation).start(self.init_std)
            if norms:
                model.set_submodule(name, AdaptedNorm(module, adapter))
            else:
                module.adapter = adapter
                module.register_forward_hook(add_adapter)
        return model
