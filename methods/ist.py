"""IST: adapters of the important layers train, a few layers per step. Yao et al., https://arxiv.org/abs/2410.11772"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.architectures import role
from methods.base import Adapted, Method, Part, Unsupported, register
from methods.lisa import separate_layers, trained_layers, wake
from methods.lora import LoRA


def adapted_layers(model: nn.Module) -> list[list[Adapted]]:
    """The adapted modules of each layer (block), from the bottom, without layers that have none."""
    pattern = re.compile(role(model, "layers"))
    layers = [m for n, m in model.named_modules() if pattern.search(n)]
    found = [[m for m in layer.modules() if isinstance(m, Adapted)] for layer in layers]
    return [adapted for adapted in found if adapted]


@contextmanager
def suppressed(layers: list[list[Adapted]], which: list[int], factor: float) -> Iterator[None]:
    """Inside the block the change that an adapter makes to its layer's output counts only `factor`."""

    def hook(module: Adapted, inputs: Any, output: Tensor) -> Tensor:
        plain = module.base(*inputs)
        return plain + factor * (output - plain)

    handles = [m.register_forward_hook(hook) for i in which for m in layers[i]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@register
@dataclass
class IST(Part):
    """Importance-aware sparse tuning of a method that adapts linear layers; alone of LoRA.

    Each layer has a score v, *high where it matters less*. Every step a share `active` of the layers, drawn with
    probability proportional to sigmoid(-v), trains its adapters. Every `every` steps v is learned by REINFORCE: in
    `rollouts` forwards a share `suppressed` of the layers, drawn with sigmoid(v), answers only with `factor` of its
    adapters' change, and the reward is exp(-loss). Followed is the official code, but for three things: its roll-outs
    see a training batch of their own, here they see that of the step, before it trains; a share of less than one
    layer is one layer; and where fewer distinct sets exist than `rollouts`, there are only so many.
    """

    lr: ClassVar[float] = 2e-4  # official script: LLaMA-7B, commonsense
    family: ClassVar[str] = "layer schedule"
    acts: ClassVar[str] = "the adapters of a quarter of the layers per step"
    formula: ClassVar[str] = "as LoRA, or as what it is composed with"
    mergeable: ClassVar[bool] = True

    active: float = 0.25  # this and all below: ist.py of the official code
    suppressed: float = 0.5
    factor: float = 0.25  # beta
    every: int = 10
    rollouts: int = 3
    score_lr: float = 10.0

    def __post_init__(self) -> None:
        for name in ("active", "suppressed"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"method.{name}={getattr(self, name)} must be a share of the layers: above 0, at most 1"
                )
        if self.every < 1 or self.rollouts < 1:
            raise ValueError(f"method.every={self.every} and method.rollouts={self.rollouts} must be at least 1")

    def alone(self) -> Method:
        return LoRA()

    def attach(self, model: nn.Module) -> None:
        count = len(trained_layers(model))
        if not count or len(adapted_layers(model)) != count:
            raise Unsupported("IST turns the adapters of layers down and off, and here not every layer has its own")
        separate_layers(model)
        self.scores, self.done = torch.zeros(count, device="cpu"), 0
        self.draw(model)

    def draw(self, model: nn.Module) -> None:
        """Choose the layers of the next step."""
        self.now = self.sample(-self.scores, self.active)
        wake(trained_layers(model), self.now)

    def sample(self, scores: Tensor, share: float) -> list[int]:
        """A share of the layers, without replacement, with probability proportional to sigmoid(scores)."""
        count = max(1, int(share * len(scores)))
        return sorted(torch.multinomial(scores.sigmoid(), count).tolist())

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Before each step layers are drawn, and scored where that is due."""
        optimizer.register_step_pre_hook(lambda _, arguments, __: self.before_step(model, arguments[-1]))

    def before_step(self, model: nn.Module, closure: Callable[[], Tensor]) -> None:
        if self.done and self.done % self.every == 0:
            self.score(model, closure)
        self.draw(model)

    @torch.no_grad()
    def score(self, model: nn.Module, closure: Callable[[], Tensor]) -> None:
        """v_i += lr (R - mean R) sigmoid(v_i) (1 - sigmoid(v_i)) for each suppressed layer of each roll-out."""
        layers, mode = adapted_layers(model), model.training
        model.eval()
        rewards: dict[tuple[int, ...], float] = {}
        size = max(1, int(self.suppressed * len(layers)))
        while len(rewards) < min(self.rollouts, math.comb(len(layers), size)):
            chosen = self.sample(self.scores, self.suppressed)
            if tuple(chosen) not in rewards:
                with suppressed(layers, chosen, self.factor):
                    rewards[tuple(chosen)] = math.exp(-float(closure()))
        model.train(mode)
        mean, slope = sum(rewards.values()) / len(rewards), self.scores.sigmoid() * (1 - self.scores.sigmoid())
        for chosen_set, reward in rewards.items():
            self.scores[list(chosen_set)] += self.score_lr * (reward - mean) * slope[list(chosen_set)]

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        self.done = step + 1

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {"scores": self.scores, "now": self.now, "done": self.done}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.scores, self.now, self.done = state["scores"].clone(), state["now"], state["done"]
        wake(trained_layers(model), self.now)
