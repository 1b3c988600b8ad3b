"""Linear probing: only the new task head is trained, on features that stay as pretrained.

Alain and Bengio, https://arxiv.org/abs/1610.01644.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from methods.base import Batch, Method, Unsupported, register


@register
@dataclass
class LinearProbe(Method):
    """The lower reference of every table: what the pretrained features give without any adaptation."""

    lr: ClassVar[float] = 1e-3  # our choice, torch's Adam default: no recipe of the paper carries over to transformers
    family: ClassVar[str] = "reference"
    acts: ClassVar[str] = "the task head"
    formula: ClassVar[str] = "0"
    mergeable: ClassVar[bool] = True  # in place

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        if not any(p.requires_grad for p in model.parameters()):
            raise Unsupported(f"{type(model).__name__} has no new task head, so a linear probe has nothing to train")
        return model
