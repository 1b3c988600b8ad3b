"""Half fine-tuning: in every block a random half of the matrices is trained. Hui et al., https://arxiv.org/abs/2404.18466"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, register, rest


@register
@dataclass
class HFT(Method):
    """Section 3.2, category-level selection: half of a block's attention, of its FFN and of its norms is frozen.

    Where a category has an odd number (gate, up and down of an FFN) half of the blocks freeze one more. A bias goes
    with its matrix. What lies outside the blocks (embeddings, head) is trained: to be confirmed, no code is public.
    The paper draws once per stage of training, which is one run here. With more `rounds` the run is divided into as
    many and each draws anew: the others rest, keep their values bit for bit, and lose their optimizer state.
    """

    lr: ClassVar[float] = 2e-5  # that of full fine-tuning, for which it stands in
    family: ClassVar[str] = "selective"
    acts: ClassVar[str] = "half of the matrices of every block"
    formula: ClassVar[str] = "half of the blocks, all outside them"
    mergeable: ClassVar[bool] = True  # in place

    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"method.rounds={self.rounds} must be at least 1")
        self.shardable = self.rounds == 1  # type: ignore[misc]

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        model.requires_grad_()
        frozen = self.draw(model)
        if self.rounds == 1:  # for good: neither counted nor stored
            for p in frozen:
                p.requires_grad_(False)
        else:
            rest(frozen)
        return model

    def draw(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of a random half, from torch's global generator."""
        blocks = categories(model)
        more = torch.zeros(len(blocks), dtype=torch.bool, device="cpu")
        more[torch.randperm(len(blocks), device="cpu")[: len(blocks) // 2]] = True
        frozen = []
        for block, one in zip(blocks, more.tolist(), strict=True):
            for layers in block:
                half = (len(layers) + one) // 2
                frozen += [layers[i] for i in torch.randperm(len(layers), device="cpu")[:half].tolist()]
        return [p for layer in frozen for p in layer.parameters()]

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        if step + 1 < steps and (step + 1) * self.rounds // steps != step * self.rounds // steps:
            self.rest_only(model, self.draw(model))

    def rest_only(self, model: nn.Module, frozen: Iterable[nn.Parameter]) -> None:
        """Wake what rests, put `frozen` to rest and forget its gradient and its momentum."""
        rest([p for p in model.parameters() if getattr(p, "resting", False)], resting=False)
        frozen = list(frozen)
        rest(frozen)
        for p in frozen:
            p.grad = None
            self._optimizer.state.pop(p, None)

    def numbers(self, model: nn.Module) -> dict[str, float]:
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return {"active_share": sum(n for n, on in sizes if on) / sum(n for n, _ in sizes)}

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {"resting": [n for n, p in model.named_parameters() if getattr(p, "resting", False)]}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        if self.rounds > 1:
            named = dict(model.named_parameters())
            self.rest_only(model, [named[n] for n in state["resting"]])


def categories(model: nn.Module) -> list[list[list[nn.Module]]]:
    """Per block: its attention's linear layers, its FFN's, its norms. Raises `Unsupported` where there are no blocks."""
    pattern = re.compile(role(model, "layers"))
    blocks = [m for n, m in model.named_modules() if pattern.search(n)]
    if not blocks:
        raise Unsupported(f"{type(model).__name__} has no blocks of which half fine-tuning could train a half")
    found = []
    for block in blocks:
        linears = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
        attention = [m for n, m in linears if "att" in n.lower()]
        ffn = [m for n, m in linears if "att" not in n.lower()]
        norms = [m for m in block.modules() if type(m).__name__.endswith("Norm")]
        found.append([attention, ffn, norms])
    return found
