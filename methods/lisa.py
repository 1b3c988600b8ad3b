"""LISA: full fine-tuning of a few layers at a time, drawn anew now and then. Pan et al., https://arxiv.org/abs/2403.17919"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from methods.architectures import role
from methods.base import Part, Unsupported, register, rest, searched, trains


def trained_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """What is trained in each layer (block) of the model, from the bottom, without layers that hold nothing trained."""
    pattern = re.compile(role(model, "layers"))
    layers = [m for n, m in model.named_modules() if pattern.search(n)]
    found = [[p for p in layer.parameters() if trains(p)] for layer in layers]
    return [parameters for parameters in found if parameters]


def separate_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trained layers, where each can rest without another. Raises `Unsupported` where that is not so."""
    layers = trained_layers(model)
    every = [p for parameters in layers for p in parameters]
    if len({id(p) for p in every}) < len(every):
        raise Unsupported("layers that share what is trained cannot rest one without another")
    if any(getattr(p, "resting", False) for p in every):
        raise Unsupported("another method decides already when a part of these layers trains: compose with one of them")
    return layers


def wake(layers: list[list[nn.Parameter]], active: list[int]) -> None:
    """Let exactly the layers `active` train; the others rest."""
    for i, parameters in enumerate(layers):
        rest(parameters, resting=i not in active)


@register
@dataclass
class LISA(Part):
    """Algorithm 1: AdamW on embeddings, head and `layers` layers drawn uniformly every `every` steps.

    What lies outside of the layers always trains, as in the official code. That code's first version keeps Adam's
    moments of resting layers, which grow to those of full fine-tuning; here they are dropped, as in its later version
    and as the paper's memory needs.
    """

    lr: ClassVar[float] = 2e-5  # official script
    family: ClassVar[str] = "layer schedule"
    acts: ClassVar[str] = "embeddings, head and some layers at a time"
    formula: ClassVar[str] = "all; at a time embeddings, head and gamma of L layers"
    mergeable: ClassVar[bool] = True  # in place

    # gamma; 2 in the paper and in the official arguments, 1 in the official scripts
    layers: int = searched(2, (1, 2, 4))
    every: int = 20  # K

    def __post_init__(self) -> None:
        if self.layers < 1 or self.every < 1:
            raise ValueError(f"method.layers={self.layers} and method.every={self.every} must be at least 1")

    def attach(self, model: nn.Module) -> None:
        count = len(separate_layers(model))
        if count < self.layers:
            raise Unsupported(f"LISA draws method.layers={self.layers} layers, and only {count} hold what is trained")
        self.draw(model)

    def draw(self, model: nn.Module) -> None:
        layers = trained_layers(model)
        self.active = sorted(torch.randperm(len(layers), device="cpu")[: self.layers].tolist())
        wake(layers, self.active)

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        if (step + 1) % self.every == 0:
            self.draw(model)
            for p in [p for p in self._optimizer.state if not p.requires_grad]:
                del self._optimizer.state[p]
                p.grad = None

    def numbers(self, model: nn.Module) -> dict[str, float]:
        return {"active_params": sum(p.numel() for p in model.parameters() if p.requires_grad)}

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {"active": self.active}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.active = state["active"]
        wake(trained_layers(model), self.active)
