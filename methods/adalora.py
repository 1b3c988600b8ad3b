"""AdaLoRA: a change in SVD form whose smallest triplets are pruned by importance. Zhang et al., https://arxiv.org/abs/2303.10512"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted, register, searched
from methods.lora import LoRA, LoRALinear

FACTORS = ("A", "B", "E")


class SVDLinear(LoRALinear):
    """Equation 3: h = W0 x + s P diag(E) Q x. A is the paper's Q (rank, in), B its P (out, rank), E its Lambda (rank,).

    `kept` (rank,) says which triplets are not pruned. For each factor `smooth` and `unsure` hold the running means of
    its sensitivity and of the sensitivity's deviation (equations 9 and 10), entry by entry; they cost what an
    optimizer's state costs and are counted with the weights.
    """

    kept: Tensor

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank, scale, dropout)
        self.E = nn.Parameter(torch.zeros_like(self.A[:, 0]))
        for factor in (self.A, self.B):
            nn.init.normal_(factor, std=0.02)
        self.register_buffer("kept", torch.ones_like(self.E, dtype=torch.bool), persistent=False)
        for name in FACTORS:
            for kind in ("smooth", "unsure"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(getattr(self, name)), persistent=False)

    def change(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A) * (self.E * self.scale), self.B)

    def weight(self) -> Tensor:
        return self.base.weight + self.scale * (self.B * self.E) @ self.A

    @torch.no_grad()
    def feel(self, beta1: float, beta2: float) -> None:
        """Equations 8 to 10: I = |w dL/dw| and the running means of it and of its deviation."""
        for name in FACTORS:
            p, smooth, unsure = (getattr(self, n) for n in (name, f"smooth_{name}", f"unsure_{name}"))
            if p.grad is not None:  # a step that half precision skipped has none
                sensitivity = (p * p.grad).abs()
                smooth.lerp_(sensitivity, 1 - beta1)
                unsure.lerp_((sensitivity - smooth).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """Equations 7 and 11: of each triplet, (rank,)."""
        A, B, E = (getattr(self, f"smooth_{n}") * getattr(self, f"unsure_{n}") for n in FACTORS)
        return E + A.mean(1) + B.mean(0)


@register
@dataclass
class AdaLoRA(LoRA):
    """Adaptive budget allocation (algorithm 1) on all linear layers, from `init_rank` down to `rank` on average.

    The budget falls by a cubic between the first `initial` and the last `final` share of the run, in steps of
    `interval` (equation 12). A triplet that was pruned keeps its gradient and may come back until the budget is
    reached; from then on what is pruned stays so. As released (and in `peft`), the penalty is the mean of
    ||P^T P - I|| and ||Q Q^T - I|| over the layers, where equation 4 sums squares.
    """

    lr: ClassVar[float] = 1.2e-3  # table 8, RTE and QNLI
    family: ClassVar[str] = "rank allocation"
    acts: ClassVar[str] = "weights of all linear layers"
    formula: ClassVar[str] = "r0 (m + n + 1) per layer"

    rank: int = 8  # of the layers' final ranks, the mean
    init_rank: int = 12  # appendix D: 1.5 times the final budget
    alpha: float = 32.0
    targets: str = "all_linear"
    initial: float = 0.15  # table 8: 600 of RTE's 3,900 steps; .09 to .18 over the tasks
    final: float = 0.46  # 1,800 of them; .44 to .58
    interval: int = 10  # table 8: 1, 10 or 100
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = searched(0.1, (0.1, 0.3, 0.5))  # gamma; .3 for RTE, .5 for CoLA

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_rank < self.rank:
            raise ValueError(f"method.init_rank={self.init_rank} must be at least method.rank={self.rank}, its target")
        if min(self.initial, self.final) < 0 or self.initial + self.final >= 1:
            raise ValueError(f"method.initial={self.initial} and method.final={self.final} must leave a share between")
        if self.interval < 1 or not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(
                f"method.interval={self.interval} must be at least 1, method.beta1={self.beta1} and "
                f"method.beta2={self.beta2} between 0 and 1"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.init_rank) if self.rslora else self.init_rank)

    def layer(self, base: nn.Linear) -> Adapted:
        return SVDLinear(base, self.init_rank, self.scale, self.dropout)

    def penalty(self, model: nn.Module) -> Tensor | float:
        return self.orthogonal * skew([f for _, m in layers(model) for f in (m.A, m.B.T)])

    def budget(self, step: int, steps: int, layers: int) -> int:
        """Equation 12: how many triplets the model may have."""
        start, end = self.bounds(steps)
        left = 1 - min(max((step - start) / (end - start), 0.0), 1.0)
        return int(layers * self.rank + layers * (self.init_rank - self.rank) * left**3)

    def bounds(self, steps: int) -> tuple[int, int]:
        """The step at which the budget begins to fall and the one at which it has fallen; the last at the latest."""
        end = max(steps - max(1, round(self.final * steps)), 1)
        return min(round(self.initial * steps), end - 1), end

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        modules = [m for _, m in layers(model)]
        start, end = self.bounds(steps)
        if step < end:
            for m in modules:
                m.feel(self.beta1, self.beta2)
        if step == end or (start < step < end and step % self.interval == 0):
            self.allocate(modules, self.budget(step, steps, len(modules)))
        elif step > end:
            prune(modules)

    def allocate(self, modules: list[SVDLinear], budget: int) -> None:
        """Keep the `budget` triplets with the highest scores of all layers."""
        scores = torch.cat([m.scores() for m in modules])
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, scores.topk(budget).indices, True)
        for m, part in zip(modules, kept.split([len(m.E) for m in modules]), strict=True):
            m.kept.copy_(part)
        prune(modules)

    def numbers(self, model: nn.Module) -> dict[str, float]:
        ranks = [int(m.kept.sum()) for _, m in layers(model)]
        return {"rank": sum(ranks), "rank_min": min(ranks), "rank_max": max(ranks)}

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {n: dict(m.named_buffers(recurse=False)) for n, m in layers(model)}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        for name, module in layers(model):
            for n, buffer in module.named_buffers(recurse=False):
                buffer.copy_(state[name][n])


def layers(model: nn.Module) -> Iterator[tuple[str, SVDLinear]]:
    """The adapted layers by name."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, SVDLinear))


def prune(modules: list[SVDLinear]) -> None:
    """Equation 6: the singular values of what is not kept are zero."""
    for m in modules:
        m.E.data.masked_fill_(~m.kept, 0.0)


def skew(factors: list[Tensor]) -> Tensor:
    """The mean distance ||F F^T - I|| of `factors` (rank, ...) from orthonormal rows."""
    return torch.stack([torch.linalg.norm(f @ f.T - torch.eye(len(f), device=f.device)) for f in factors]).mean()
