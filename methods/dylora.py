"""DyLoRA: LoRA whose factors can be cut to any rank after training. Valipour et al., https://arxiv.org/abs/2210.07558"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted, Batch, register
from methods.lora import LoRA, LoRALinear


class DyLoRALinear(LoRALinear):
    """h = W0 x + (alpha / b) B[:, :b] A[:b] x, with b = `drawn` in training and `rank` else."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, *, acting: int, frozen: bool):
        super().__init__(base, rank, alpha, dropout)
        self.drawn = self.acting = acting
        self.frozen = frozen

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A[:b], B[:, :b] and alpha / b. Frozen, the first b - 1 ranks are constants for the backward pass."""
        b = self.drawn if self.training else self.acting
        A, B = self.A[:b], self.B[:, :b]
        if self.training and self.frozen:
            A = torch.cat([A[:-1].detach(), A[-1:]])
            B = torch.cat([B[:, :-1].detach(), B[:, -1:]], 1)
        return A, B, self.scale / b

    def change(self, x: Tensor) -> Tensor:
        A, B, scale = self.factors()
        return F.linear(F.linear(self.dropout(x.to(A.dtype)), A) * scale, B)

    def weight(self) -> Tensor:
        """At the rank of evaluation, whatever the mode: the weight that is stored, merged and looked at."""
        b = self.acting
        return self.base.weight + self.scale / b * self.B[:, :b] @ self.A[:b]


@register
@dataclass
class DyLoRA(LoRA):
    """Dynamic low-rank adaptation (algorithm 1): each step draws one rank b in `rank_min` to `rank` for all layers.

    The draw is uniform. `frozen` updates the b-th row and column alone, otherwise the first b. Evaluation acts with
    `eval_rank` (null: `rank`) and its own scale.
    """

    family: ClassVar[str] = "rank allocation"

    rank_min: int = 1
    eval_rank: int | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank_min <= self.rank:
            raise ValueError(f"method.rank_min={self.rank_min} must be 1 to method.rank={self.rank}")
        if self.eval_rank is not None and not 1 <= self.eval_rank <= self.rank:
            raise ValueError(f"method.eval_rank={self.eval_rank} must be 1 to method.rank={self.rank}, or null")
        if self.rslora:
            raise ValueError(
                "method.rslora=True: DyLoRA divides alpha by the rank that it draws; only False is possible"
            )

    def layer(self, base: nn.Linear) -> Adapted:
        acting = self.eval_rank or self.rank
        return DyLoRALinear(base, self.rank, self.alpha, self.dropout, acting=acting, frozen=self.frozen)

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        model = super().apply(model, batches)
        self.draw(model)
        return model

    def draw(self, model: nn.Module) -> None:
        """The rank of the next step, from torch's global generator."""
        self.set(model, int(torch.randint(self.rank_min, self.rank + 1, (), device="cpu")))

    def set(self, model: nn.Module, rank: int) -> None:
        """Give all layers the rank of the next step."""
        self.drawn = rank
        for m in model.modules():
            if isinstance(m, DyLoRALinear):
                m.drawn = rank

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        self.draw(model)

    def numbers(self, model: nn.Module) -> dict[str, float]:
        return {"rank_drawn": self.drawn}

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.set(model, state["drawn"])
