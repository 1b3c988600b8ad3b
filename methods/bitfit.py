"""BitFit: only the bias vectors are trained. Ben Zaken et al., https://arxiv.org/abs/2106.10199"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, register


@register
@dataclass
class BitFit(Method):
    """Train the biases that exist (section 3): linear layers and LayerNorms, in the embeddings too.

    `biases="query_mlp"` is the paper's smaller variant (section 4, `b_q` and `b_m2`): the biases of the query and of
    the first FFN layer of each block.
    """

    lr: ClassVar[float] = 4e-4  # appendix A.2: 1e-4, 4e-4, 7e-4 or 1e-3
    lr_range: ClassVar[tuple[float, float] | None] = (1e-4, 1e-3)
    family: ClassVar[str] = "selective"
    acts: ClassVar[str] = "biases"
    formula: ClassVar[str] = "the biases that exist"
    mergeable: ClassVar[bool] = True  # in place

    biases: str = "all"  # all, query_mlp

    def __post_init__(self) -> None:
        if self.biases not in ("all", "query_mlp"):
            raise ValueError(f"method.biases={self.biases!r}: the options are all, query_mlp")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        where = "" if self.biases == "all" else f"{role(model, 'query')}|{role(model, 'mlp_input')}"
        chosen = [
            module.bias
            for name, module in model.named_modules()
            if isinstance(getattr(module, "bias", None), nn.Parameter) and re.search(where, name)
        ]
        frozen = [p for p in chosen if not p.requires_grad]
        if not frozen:
            raise Unsupported(f"{type(model).__name__} has no bias vectors for BitFit to train")
        for p in frozen:
            p.requires_grad_()
        return model
