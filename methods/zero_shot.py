"""Zero-shot: the pretrained model as it is, scored without training: the row that fine-tuning must beat.

Brown et al., https://arxiv.org/abs/2005.14165.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from methods.base import Batch, Method, Unsupported, register


@register
@dataclass
class ZeroShot(Method):
    """For tasks whose answers a language model can give at once. Fine-tuning may fall below it.

    PEFT-Bench: on GSM8K six of six methods made an instruction-tuned model worse.
    """

    family: ClassVar[str] = "reference"
    acts: ClassVar[str] = "nothing"
    formula: ClassVar[str] = "0"
    mergeable: ClassVar[bool] = True  # in place
    untrained: ClassVar[bool] = True
    backward: ClassVar[bool] = False

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        if any(p.requires_grad for p in model.parameters()):
            raise Unsupported(f"{type(model).__name__} has a new task head: untrained, its answers would be chance")
        return model

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """One that holds a number outside the model: torch has none of nothing."""
        return torch.optim.SGD([torch.zeros(())], lr)
