"""LN-tuning: only scale and shift of the normalisation layers are trained. Qi et al., https://arxiv.org/abs/2211.08682

Zhao et al., https://arxiv.org/abs/2312.11420, find the same in multi-modal decoders.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from methods.base import Batch, Method, Unsupported, register


@register
@dataclass
class LNTuning(Method):
    """Train gain and bias of every LayerNorm, or the gain of every RMSNorm, that of the embeddings and the last one too.

    Zhao et al. train those inside the blocks, and beside them embeddings and head ("LayerNorm-simple": none of these).
    """

    lr: ClassVar[float] = 1e-3  # our choice, larger than LoRA's: at 1e-4 `peft`'s own comparison scores 0 with it
    family: ClassVar[str] = "selective"
    acts: ClassVar[str] = "norms"
    formula: ClassVar[str] = "2 d per LayerNorm, d per RMSNorm"
    oracle: ClassVar[str] = "peft"
    mergeable: ClassVar[bool] = True  # in place

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
        if not any(True for m in norms for _ in m.parameters()):
            raise Unsupported(f"{type(model).__name__} has no normalisation layers with parameters to train")
        for norm in norms:
            norm.requires_grad_()
        return model
