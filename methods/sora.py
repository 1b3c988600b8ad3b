"""SoRA: LoRA with a gate per rank that a proximal step shrinks to zero. Ding et al., https://arxiv.org/abs/2311.11696"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted, fused, register, searched
from methods.lora import LoRA, LoRALinear


def soft_threshold(g: Tensor, threshold: float) -> Tensor:
    """Soft threshold: sign(g) max(|g| - threshold, 0), the proximal operator of threshold ||g||_1."""
    return g.sign() * (g.abs() - threshold).clamp_min(0)


class SoRALinear(LoRALinear):
    """h = W0 x + s B (g * (A x)) with the gate g (rank,), drawn from a normal distribution."""

    elastic = True

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank, scale, dropout)
        self.gate = nn.Parameter(torch.randn_like(self.A[:, 0]))

    def change(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A) * (self.gate * self.scale), self.B)

    def weight(self) -> Tensor:
        return self.base.weight + self.scale * (self.B * self.gate) @ self.A

    @torch.no_grad()
    def drop(self) -> None:
        """Leave out the ranks whose gate is zero (section 3.3): a smaller adapter of the same function."""
        open_ = self.gate != 0
        for p, kept in ((self.A, self.A[open_]), (self.B, self.B[:, open_]), (self.gate, self.gate[open_])):
            p.data = kept.clone()


class ProximalAdamW(torch.optim.AdamW):
    """AdamW, and after it the soft threshold on the groups that have a `threshold`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            if group.get("threshold"):
                for p in [p for p in group["params"] if p.grad is not None]:
                    p.copy_(soft_threshold(p, group["threshold"]))
        return loss


@register
@dataclass
class SoRA(LoRA):
    """Sparse low-rank adaptation of all linear layers: ranks whose gate reaches zero are left out after training.

    `threshold` is taken off every gate in every step, as in the released script; the paper, and a second optimizer in its repository, multiply it by the learning rate. It
    has to fit the number of steps: a gate of 1 that the loss does not hold closes after 1 / threshold of them. The
    released operator shrinks and then zeroes what is below the threshold again, which removes up to twice of it:
    here the paper's is followed. A gate has no weight decay.
    """

    lr: ClassVar[float] = 8e-4  # released script, STS-B; 1.2e-3 for RTE
    family: ClassVar[str] = "rank allocation"
    acts: ClassVar[str] = "weights of all linear layers"
    formula: ClassVar[str] = "r (m + n + 1) per layer, fewer in the end"
    oracle: ClassVar[str] = "closed form"

    targets: str = "all_linear"
    # lambda; released script, STS-B; up to 7e-4 for RTE; searched: around both
    threshold: float = searched(3e-4, low=1e-4, high=1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise ValueError(f"method.threshold={self.threshold} must be 0 (nothing is pruned) or more")

    def layer(self, base: nn.Linear) -> Adapted:
        return SoRALinear(base, self.rank, self.scale, self.dropout)

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        gates = [m.gate for m in model.modules() if isinstance(m, SoRALinear)]
        ids = {id(g) for g in gates}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": gates, "weight_decay": 0.0, "threshold": self.threshold},
        ]
        return ProximalAdamW(groups, lr, weight_decay=weight_decay, fused=fused(others + gates))

    def finish(self, model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, SoRALinear):
                m.drop()

    def numbers(self, model: nn.Module) -> dict[str, float]:
        ranks = [int(m.gate.count_nonzero()) for m in model.modules() if isinstance(m, SoRALinear)]
        return {"rank": sum(ranks), "rank_min": min(ranks), "rank_max": max(ranks)}
