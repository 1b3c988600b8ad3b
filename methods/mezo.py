"""MeZO: fine-tuning with forward passes alone, in the memory of inference. Malladi et al., https://arxiv.org/abs/2305.17333"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Part, register, trains


class MeZOSGD(torch.optim.Optimizer):
    """Algorithm 1: g = (L(theta + eps z) - L(theta - eps z)) / 2 eps, then theta <- theta - lr g z, all in place.

    z is drawn anew from the step's seed each time that it is needed, one parameter after the other: three times, since
    the way back to theta and the step from there share one. Both losses are
    those of the model in evaluation, without dropout, as in the authors' code.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, *, eps: float):
        trained = [p for p in model.parameters() if trains(p)]
        super().__init__(trained, {"lr": lr, "weight_decay": weight_decay, "eps": eps})
        self.model = model

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Two calls of the closure without grad; returns the mean of the two losses."""
        seed, eps = int(torch.randint(2**31, ())), self.defaults["eps"]
        mode = self.model.training
        self.model.eval()
        self.move(seed, eps)
        plus = closure()
        self.move(seed, -2 * eps)
        minus = closure()
        self.model.train(mode)
        slope = float(plus - minus) / (2 * eps)
        for group, p, z in self.noise(seed):
            p.add_(z, alpha=eps)  # back to theta
            if group["weight_decay"] and p.ndim > 1:  # no decay of biases and norms
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(z, alpha=-slope * group["lr"])
        return (plus + minus) / 2

    def move(self, seed: int, size: float) -> None:
        """theta <- theta + size z with the z of `seed`."""
        for _, p, z in self.noise(seed):
            p.add_(z, alpha=size)

    def noise(self, seed: int) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Each trained parameter with its group and its part of the z of `seed`."""
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.requires_grad]:
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(seed)
                yield group, p, torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=p.dtype)


@register
@dataclass
class MeZO(Part):
    """Memory-efficient zeroth-order SGD on what another method trains; alone on all parameters.

    It needs far more steps than methods with gradients (the paper: up to 100,000), a prompt that makes the task one
    of language modelling, and other values for other parametrisations (authors' README): with LoRA a learning rate of 1e-4,
    with prefixes 1e-2 and eps 1e-1.
    """

    lr: ClassVar[float] = 1e-6  # authors' README: RoBERTa-large, all parameters
    family: ClassVar[str] = "optimizer"
    acts: ClassVar[str] = "the loss alone: no backward pass"
    formula: ClassVar[str] = "all, or as what it is composed with; no optimizer state"
    mergeable: ClassVar[bool] = True  # in place
    backward: ClassVar[bool] = False

    eps: float = 1e-3  # authors' README

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"method.eps={self.eps} must be positive; the paper's is 1e-3")

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return MeZOSGD(model, lr, weight_decay, eps=self.eps)
