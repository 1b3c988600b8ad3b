"""GaLore: Adam on a low-rank projection of each weight's gradient. Zhao et al., https://arxiv.org/abs/2403.03507"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from methods.architectures import role
from methods.base import Part, Unsupported, fused, register, trains


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
        if "rank" in group:
            if (t - 1) % group["every"] == 0:
                state["projection"] = projection(grad, group["rank"])
            grad = project(grad, state["projection"])
        if t == 1:
            state["mean"], state["square"] = torch.zeros_like(grad), torch.zeros_like(grad)
        if "rank" in group:
            step = torch.zeros_like(grad)
            self._adam(step, grad, state, group["lr"])
            add_back(p, step, state["projection"], group["scale"])
        else:
            self._adam(p, grad, state, group["lr"])
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    def _adam(self, p: Any, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        """torch's update, in one kernel where it has one. The package adds eps to the root before the correction: so is it here."""
        beta1, beta2 = self.betas
        eps = self.eps / math.sqrt(1 - beta2 ** state["step"])
        before: Any = torch.full((), state["step"] - 1.0, device=p.device)
        adamw(
            [p], [grad], [state["mean"]], [state["square"]], [], [before], fused=fused([p]), amsgrad=False, maximize=False,
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0,
        )  # fmt: skip


def projection(grad: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of an (m, n) gradient on its smaller side: (n, rank) if m >= n, else (m, rank)."""
    exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
    u, _, vt = torch.linalg.svd(exact, full_matrices=False)
    side = vt[:rank].T if grad.shape[0] >= grad.shape[1] else u[:, :rank]
    return side.to(grad.dtype).clone(memory_format=torch.contiguous_format)  # a view would keep all of them


def project(grad: Tensor, P: Tensor) -> Tensor:
    """G Q for m >= n, else P^T G: (m, rank) or (rank, n)."""
    return grad @ P if grad.shape[0] >= grad.shape[1] else P.T @ grad


def add_back(p: Tensor, step: Tensor, P: Tensor, rate: float) -> None:
    """p += rate N Q^T for an (m, n) weight with m >= n, else rate P N: a matrix of its shape is never built."""
    factors = (step, P.T) if p.shape[0] >= p.shape[1] else (P, step)
    p.addmm_(*factors, alpha=rate)


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
