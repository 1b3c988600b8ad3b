"""GaLore: Adam on a low-rank projection of each weight's gradient. Zhao et al., https://arxiv.org/abs/2403.03507"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.architectures import role
from methods.base import Part, Unsupported, register, trains


class GaLoreAdamW(torch.optim.Optimizer):
    """Algorithm 2, as the authors' package has it: AdamW, projected in the groups that have a `rank`.

    Per projected (m, n) weight the state is one projection of min(m, n) x rank and two moments of max(m, n) x rank.
    Where the projection is refreshed the moments stay as they are, in the coordinates of the old one.
    """

    betas = (0.9, 0.999)
    eps = 1e-6  # of the package

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        t = state["step"] = state.get("step", 0) + 1
        projected = "rank" in group
        if projected:
            if (t - 1) % group["every"] == 0:
                state["projection"] = projection(grad, group["rank"])
            grad = project(grad, state["projection"])
        if t == 1:
            state["mean"], state["square"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["mean"].lerp_(grad, 1 - self.betas[0])
        state["square"].mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])
        rate = group["lr"] * math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t)
        root = state["square"].sqrt().add_(self.eps)
        if projected:
            p.add_(project_back(state["mean"] / root, state["projection"], p.shape), alpha=-rate * group["scale"])
        else:
            p.addcdiv_(state["mean"], root, value=-rate)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def projection(grad: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of an (m, n) gradient on its smaller side: (n, rank) if m >= n, else (m, rank)."""
    exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
    u, _, vt = torch.linalg.svd(exact, full_matrices=False)
    side = vt[:rank].T if grad.shape[0] >= grad.shape[1] else u[:, :rank]
    return side.to(grad.dtype).clone(memory_format=torch.contiguous_format)  # a view would keep all of them


def project(grad: Tensor, P: Tensor) -> Tensor:
    """G Q for m >= n, else P^T G: (m, rank) or (rank, n)."""
    return grad @ P if grad.shape[0] >= grad.shape[1] else P.T @ grad


def project_back(step: Tensor, P: Tensor, shape: torch.Size) -> Tensor:
    """N Q^T or P N, of the weight's `shape` (m, n)."""
    return step @ P.T if shape[0] >= shape[1] else P @ step


@register
@dataclass
class GaLore(Part):
    """Gradient low-rank projection: every weight is trained, and the optimizer's state is of rank `rank`.

    The trained matrices inside the layers that `targets` names are projected; embeddings, norms, biases and the head
    have plain AdamW, as in the authors' fine-tuning. Gradients are whole here; their freeing layer by layer during
    the backward pass, which the paper adds, is not part of the update.
    """

    lr: ClassVar[float] = 3e-5  # authors' README: RoBERTa-base, MRPC
    family: ClassVar[str] = "optimizer"
    acts: ClassVar[str] = "gradients of all linear layers"
    formula: ClassVar[str] = "all; optimizer state (min(m, n) + 2 max(m, n)) r per layer"
    oracle: ClassVar[str] = "galore-torch, closed form"
    mergeable: ClassVar[bool] = True  # in place

    rank: int = 4  # this and the two below: authors' README, MRPC
    scale: float = 4.0  # alpha in the paper
    every: int = 500  # steps between two projections: T in the paper
    targets: str = "all_linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.every < 1:
            raise ValueError(f"method.rank={self.rank} and method.every={self.every} must be at least 1")

    def attach(self, model: nn.Module) -> None:
        if not self.matrices(model):
            raise Unsupported(f"galore projects gradients of matrices, and nothing trains one in {self.targets!r}")

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        """The trained matrices in the target layers."""
        pattern = re.compile(role(model, self.targets))
        inside = [p for n, m in model.named_modules() if pattern.search(n) for p in m.parameters()]
        return [p for p in dict.fromkeys(inside) if trains(p) and p.ndim == 2]

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        matrices = self.matrices(model)
        held = {id(p) for p in matrices}
        others = [p for p in model.parameters() if trains(p) and id(p) not in held]
        groups: list[dict[str, Any]] = [{"params": others}]
        groups += [{"params": matrices, "rank": self.rank, "every": self.every, "scale": self.scale}]
        return GaLoreAdamW(groups, {"lr": lr, "weight_decay": weight_decay})
