"""IncreLoRA: the most important layers get more ranks while training. Zhang et al., https://arxiv.org/abs/2308.12043"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.adalora import skew
from methods.base import Adapted, Batch, fused, placement, register, rest
from methods.lora import LoRA
from methods.restarts import RestartedAdamW


class Pieces(nn.ParameterList):
    """One factor: what every growth brought, in its order."""

    elastic = True


class IncreLoRALinear(Adapted):
    """h = W0 x + s B diag(E) A x with s = alpha / rank, A (rank, in), B (out, rank) and E (rank,) in pieces.

    The last piece is the reserve: its A and B are trained already, beside an E that rests at a small value ("advance
    learning"). It does not count as rank. A `fused` layer has one piece with s in E.
    While it is `growing`, `score` gathers the importance of `feel` over a step; `smooth` and `unsure` are its running mean and deviation.
    """

    base: nn.Linear
    score: Tensor
    smooth: Tensor
    unsure: Tensor

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, *, grow: int, reserve: float):
        super().__init__(base)
        self.A, self.B, self.E = Pieces(), Pieces(), Pieces()
        self.alpha, self.dropout, self.reserve = alpha, nn.Dropout(dropout), reserve
        self.growing, self.fused = True, False  # more ranks may come; it is of one piece
        self.add(rank, 0.0)
        rest([self.add(grow, reserve)])
        for name in ("score", "smooth", "unsure"):
            self.register_buffer(name, torch.zeros_like(self.E[0][0]), persistent=False)

    def add(self, ranks: int, value: float) -> nn.Parameter:
        """A new last piece; return its E."""
        where = placement(self.base) if not len(self.E) else {"device": self.E[0].device, "dtype": self.E[0].dtype}
        shapes = ((ranks, self.base.in_features), (self.base.out_features, ranks), (ranks,))
        piece = [nn.Parameter(torch.zeros(shape, **where)) for shape in shapes]
        for p in piece[:2]:
            nn.init.normal_(p, std=0.02)
        nn.init.constant_(piece[2], value)
        for factor, p in zip((self.A, self.B, self.E), piece, strict=True):
            factor.append(p)
        return piece[2]

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([*self.A]), torch.cat([*self.B], 1), torch.cat([*self.E])

    @property
    def rank(self) -> int:
        """Without the reserve."""
        return sum(len(e) for e in self.E) - (0 if self.fused else len(self.E[-1]))

    @property
    def scale(self) -> float:
        return 1.0 if self.fused else self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y, (A, B, E) = self.base(x), self.factors()
        x = self.dropout(x.to(A.dtype))
        change = F.linear(F.linear(x, A) * (E * self.scale), B)
        if self.growing and self.training and change.requires_grad:
            change.register_hook(lambda grad: self.feel(x.detach(), grad))
        return y + change.to(y.dtype)

    @torch.no_grad()
    def feel(self, x: Tensor, grad: Tensor) -> None:
        """The layer's importance: sum |dW * dL/ddW| / sqrt(out in). Both matrices live for this moment alone."""
        A, B, E = self.factors()
        gradient = grad.flatten(0, -2).T.to(A.dtype) @ x.flatten(0, -2).to(A.dtype)
        change = (B * E) @ A * self.scale
        self.score += change.mul_(gradient).abs_().sum() / math.sqrt(change.numel())

    def weight(self) -> Tensor:
        A, B, E = self.factors()
        return self.base.weight + self.scale * (B * E) @ A

    def keep(self, pieces: int) -> None:
        """Leave out what came after the first `pieces` pieces."""
        self.A, self.B, self.E = (factor[:pieces] for factor in (self.A, self.B, self.E))

    def retire(self) -> None:
        """No more growth: the reserve is no part of the layer any longer."""
        self.E[-1].data.zero_()
        rest([self.A[-1], self.B[-1]])
        self.growing = False

    @torch.no_grad()
    def fuse(self) -> None:
        """One piece per factor, with the scale in E and without the triplets of value zero."""
        A, B, E = self.factors()
        E, on = E * self.scale, E != 0
        self.A, self.B, self.E = (Pieces([nn.Parameter(t.clone())]) for t in (A[on], B[:, on], E[on]))
        self.fused = True


@register
@dataclass
class IncreLoRA(LoRA):
    """Incremental allocation (algorithm 1) on all linear layers, from `init_rank` up to `rank` on average.

    Between the `start` and `end` share of the run, in equal intervals, the `top` layers by smoothed score get `grow`
    ranks each: their reserve joins, and a new one begins to learn. Tensors really grow, and never beyond the target.
    As released, s falls with a layer's rank, so that its output jumps by old / new rank when it grows, and the penalty
    is the mean of ||A A^T - I|| and ||B^T B - I|| over the layers. Late parameters have their own warm-up, over
    `start`, below the run's schedule; the released one brings them to the full learning rate again.
    """

    lr: ClassVar[float] = 1.2e-3  # released script, RTE
    family: ClassVar[str] = "rank allocation"
    acts: ClassVar[str] = "weights of all linear layers"
    formula: ClassVar[str] = "(r0 + k) (m + n + 1) per layer, growing to r (m + n + 1) on average"
    oracle: ClassVar[str] = "closed form"
    neutral: ClassVar[bool] = False  # near the pretrained model: by `reserve`
    parallel: ClassVar[bool] = False  # its importance is a sum of absolute values within one process

    rank: int = 2  # of the layers' final ranks, the mean
    init_rank: int = 1
    alpha: float = 32.0
    targets: str = "all_linear"
    grow: int = 1  # k; released: half of `rank`
    top: int = 5  # h
    reserve: float = 1e-5  # E of the triplets that learn in advance
    start: float = 0.026  # released script, RTE: 100 of 3,900 steps
    end: float = 0.41  # 15 intervals of 100 steps later
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.1  # released scripts: 0.1, in two of them (RTE among them) 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.init_rank <= self.rank:
            raise ValueError(f"method.init_rank={self.init_rank} must be 1 to method.rank={self.rank}, its target")
        if min(self.grow, self.top) < 1:
            raise ValueError(f"method.grow={self.grow} and method.top={self.top} must be at least 1")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"method.start={self.start} must lie below method.end={self.end}, both from 0 to 1")
        self.history: list[list[str]] = []  # of each growth, the layers
        self._optimizer: RestartedAdamW | None = None

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.history, self._optimizer = [], None
        return super().apply(model, batches)

    def layer(self, base: nn.Linear) -> Adapted:
        return IncreLoRALinear(base, self.init_rank, self.alpha, self.dropout, grow=self.grow, reserve=self.reserve)

    def penalty(self, model: nn.Module) -> Tensor | float:
        factors = ((torch.cat([*m.A]), torch.cat([*m.B], 1).T) for _, m in layers(model))
        return self.orthogonal * skew([f for pair in factors for f in pair])

    def rounds(self, model: nn.Module) -> int:
        """How many growths it takes to reach the target."""
        count = sum(1 for _ in layers(model))
        return math.ceil(count * (self.rank - self.init_rank) // self.grow / min(self.top, count))

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """A group for what is trained now and one, still empty, for each growth: a schedule counts its groups once."""
        trained = [[p for p in model.parameters() if p.requires_grad], *([] for _ in range(self.rounds(model)))]
        groups = [{"params": parameters, "age": 0, "warm": 1} for parameters in trained]
        self._optimizer = RestartedAdamW(groups, lr, weight_decay=weight_decay, fused=fused(trained[0]))
        self.refill(model)
        return self._optimizer

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        total, share = self.rounds(model), ((step + 1) / steps - self.start) / (self.end - self.start)
        if len(self.history) >= total:
            return
        for _, m in layers(model):
            m.smooth.lerp_(m.score, 1 - self.beta1)
            m.unsure.lerp_((m.score - m.smooth).abs(), 1 - self.beta2)
            m.score.zero_()
        while len(self.history) < min(total, math.floor(total * share + 1e-9)):
            self.increase(model, max(1, round(self.start * steps)))

    def increase(self, model: nn.Module, warm: int) -> None:
        """The layers with the highest scores get `grow` ranks; after the last growth all reserves go."""
        named = dict(layers(model))
        left = len(named) * self.rank - sum(m.rank for m in named.values())
        scores = torch.stack([m.smooth * m.unsure for m in named.values()])
        best = scores.topk(min(self.top, len(named), left // self.grow)).indices.tolist()
        grown = [list(named)[i] for i in best]
        for name in grown:
            rest([named[name].E[-1]], resting=False)
            rest([named[name].add(self.grow, self.reserve)])
        self.history.append(grown)
        if len(self.history) == self.rounds(model):
            for m in named.values():
                m.retire()
        if self._optimizer is not None:
            self._optimizer.param_groups[len(self.history)]["warm"] = warm
        self.refill(model)

    def refill(self, model: nn.Module) -> None:
        """Give the optimizer's groups what each growth brought: the reserve's E and the next reserve's A and B."""
        if self._optimizer is None:
            return
        named, last = dict(layers(model)), dict.fromkeys(dict(layers(model)), 1)
        for group, names in zip(self._optimizer.param_groups[1:], self.history, strict=False):
            group["params"] = []
            for name in names:
                m, i = named[name], last[name]
                last[name] += 1
                group["params"] += [m.E[i], m.A[i + 1], m.B[i + 1]]

    def finish(self, model: nn.Module) -> None:
        for _, m in layers(model):
            m.fuse()

    def numbers(self, model: nn.Module) -> dict[str, float]:
        ranks = [m.rank for _, m in layers(model)]
        return {"rank": sum(ranks), "rank_min": min(ranks), "rank_max": max(ranks)}

    def state(self, model: nn.Module) -> dict[str, Any]:
        kept = {n: [len(m.E), m.smooth, m.unsure] for n, m in layers(model)}
        return {"history": [*map(list, self.history)], "layers": kept}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.history = [list(names) for names in state["history"]]
        for name, m in layers(model):
            pieces, smooth, unsure = state["layers"][name]
            m.keep(pieces)
            while len(m.E) < pieces:
                m.add(self.grow, self.reserve)
            rest([*m.A, *m.B, *m.E], resting=False)
            rest([m.E[-1]])
            if len(self.history) == self.rounds(model):
                m.retire()
            m.smooth.copy_(smooth), m.unsure.copy_(unsure)
        self.refill(model)


def layers(model: nn.Module) -> Iterator[tuple[str, IncreLoRALinear]]:
    """The adapted layers by name."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, IncreLoRALinear))
