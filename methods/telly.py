"""Telly-K: embeddings and the bottom K blocks stay frozen, all else is trained. Shi et al., https://arxiv.org/abs/2304.05216"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, register

# What runs before the blocks, in every architecture of the table; the last is the norm of DeBERTa's relative positions.
EMBEDDINGS = re.compile(r"embed|^shared\.|\bwte\b|\bwpe\b|encoder\.LayerNorm")


@register
@dataclass
class Telly(Method):
    """Section 5: full fine-tuning of blocks K + 1 to L and of what comes after them; K = 0 freezes the embeddings only.

    Backward ends at block K + 1, so that no activation of the blocks below is kept. An output layer that is tied to
    the embeddings is frozen with them. Encoder and decoder of an encoder-decoder are counted through: its bottom
    blocks are the encoder's.
    """

    lr: ClassVar[float] = 2e-5  # 2e-5 or 5e-5 in the released logs
    family: ClassVar[str] = "selective"
    acts: ClassVar[str] = "all weights of the upper blocks"
    formula: ClassVar[str] = "(L - K) blocks and what follows them"
    mergeable: ClassVar[bool] = True  # in place
    shardable: ClassVar[bool] = True

    blocks: int = 5  # K; the paper sweeps 0 to 11 of 12

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"method.blocks={self.blocks} must be 0 (embeddings only) or more")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        pattern = re.compile(role(model, "layers"))
        blocks = [n for n, _ in model.named_modules() if pattern.search(n)]
        if self.blocks >= len(blocks):
            raise Unsupported(
                f"{type(model).__name__} has {len(blocks)} blocks: with the bottom {self.blocks} frozen none is left "
                f"to train; give method.blocks below {len(blocks)}"
            )
        below = tuple(f"{name}." for name in blocks[: self.blocks])
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or not (name.startswith(below) or EMBEDDINGS.search(name)))
        return model
