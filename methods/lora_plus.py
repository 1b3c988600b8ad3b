"""LoRA+: a larger learning rate for B than for A. Hayou, Ghosh and Yu, https://arxiv.org/abs/2402.12354"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from methods.base import Method, Part, Unsupported, fused, register, searched, trains
from methods.lora import LoRA


@register
@dataclass
class LoRAPlus(Part):
    """Section 4: eta_B = `ratio` eta_A under AdamW, with eta_A the learning rate of the run.

    For any method whose layers hold factors A and B. The official code gives biases and other vectors the larger rate
    as well; here, as in the paper, only B has it, and the task head keeps the learning rate of the run.
    """

    lr: ClassVar[float] = 5e-5  # of A: the example in the official repository
    family: ClassVar[str] = "optimizer"
    acts: ClassVar[str] = "the learning rate of B"
    formula: ClassVar[str] = "as LoRA, or as what it is composed with"
    oracle: ClassVar[str] = "peft"
    mergeable: ClassVar[bool] = True

    ratio: float = searched(16.0, low=4.0, high=64.0)  # section 5: 2^4; searched: around it

    def __post_init__(self) -> None:
        if self.ratio <= 0:
            raise ValueError(f"method.ratio={self.ratio} must be positive; 1 is the same learning rate for A and B")

    def alone(self) -> Method:
        return LoRA()

    def attach(self, model: nn.Module) -> None:
        if not _named_b(model):
            raise Unsupported("lora_plus sets the learning rate of factors called B, and nothing here trains any")

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW with two groups: all but the B, and the B at `ratio` times the learning rate."""
        b = _named_b(model)
        held = {id(p) for p in b}
        others = [p for p in model.parameters() if trains(p) and id(p) not in held]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": b, "lr": lr * self.ratio}]
        parameters = (p for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr, weight_decay=weight_decay, fused=fused(parameters))


def _named_b(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "B" and trains(p)]
