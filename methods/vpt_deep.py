"""VPT-deep: trained tokens behind a ViT's class token, fresh ones at every layer. Jia et al., arxiv.org/abs/2203.12119"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from methods.base import register
from methods.vpt_shallow import VPTShallow


@register
@dataclass
class VPTDeep(VPTShallow):
    """VPT-deep: layer i reads [x, P_i, E], and what it makes of P_i is not read by layer i + 1."""

    acts: ClassVar[str] = "the sequence of patches, at each layer"
    formula: ClassVar[str] = "L p d"

    def prompted(self, layers: list[nn.Module]) -> list[nn.Module]:
        return layers
