"""LST: a narrow network beside a frozen backbone, without a gradient through it. Sung et al., arxiv.org/abs/2206.06522"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, register, searched
from methods.ladder import Ladder, T5Ladder
from methods.pruned_start import first_channels, fisher, magnitude, start_blocks

STACKS = ("bert", "roberta", "distilbert", "vit", "deit", "llama", "qwen2", "qwen3", "gpt2", "t5")
STARTS = ("fisher", "magnitude", "random")


def stacks(model: Any) -> list[tuple[Any, type[Ladder]]]:
    """What holds the layers, from the input on, and its kind of ladder."""
    if model.config.is_encoder_decoder:
        return [(model.get_encoder(), T5Ladder), (model.get_decoder(), T5Ladder)]
    return [(model.base_model, Ladder)]


@register
@dataclass
class LST(Method):
    """Sections 3.1 to 3.4: ladders lead from the backbone's hidden states to a side network; its output, brought up to
    the backbone's width, goes to the backbone's own head.

    mu weighs the side's state as in the official code, where the paper's weighs the backbone's: the same functions with
    alpha of the other sign. The backbone's final norm is replaced by a narrow one, as there; its dropout is off in training
    (`bench/prefix.py`), but for T5's. `start` is that of the side blocks; see `pruned_start.py`.
    """

    lr: ClassVar[float] = 3e-3  # official script for T5-base
    family: ClassVar[str] = "side network"
    acts: ClassVar[str] = "beside the backbone"
    formula: ClassVar[str] = "blocks of width d / k, and (L + 2) ladders d^2 / k"
    neutral: ClassVar[bool] = False  # the head reads the side network

    reduction: int = searched(8, (4, 8, 16))  # k; searched: around it
    drop: int = 4  # every so many-th side block is left out, from the first on (T5-base); 0 keeps all
    temperature: float = 0.1  # T
    start: str = "fisher"  # of the side blocks: pruned by Fisher information or `magnitude`, or `random`
    fisher_samples: int = 1024  # official code

    def __post_init__(self) -> None:
        if self.reduction < 1 or self.drop < 0 or self.drop == 1 or self.temperature <= 0:
            raise ValueError(
                f"method.reduction={self.reduction} must be at least 1, method.drop={self.drop} 0 or at least 2, "
                f"method.temperature={self.temperature} positive"
            )
        if self.start not in STARTS or self.fisher_samples < 1:
            raise ValueError(
                f"method.start={self.start!r}: the options are {', '.join(STARTS)}; "
                f"method.fisher_samples={self.fisher_samples} must be at least 1"
            )

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", "") not in STACKS:
            raise Unsupported(
                f"lst builds narrow blocks for {', '.join(STACKS)}; those of {type(model).__name__} need what it cannot narrow"
            )
        scores = self.scores(model, batches)
        keep = first_channels(model, self.reduction, scores) if scores else None
        for stack, kind in stacks(model):
            inside = [n for n, _ in stack.named_modules() if re.search(role(model, "layers"), n)]
            layers = [stack.get_submodule(n) for n in inside]
            stack.ladder = ladder = kind(stack, layers, self)
            if keep is not None:
                blocks = dict(zip(ladder.rungs, ladder.blocks, strict=True))
                keep = start_blocks(model, layers, blocks, scores, keep)
            ladder.attach(stack, layers, stack.get_submodule(inside[0].rpartition(".")[0].rpartition(".")[0]))
        return model

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[int, Tensor]:
        """The importance of each weight of the backbone by its id (section 3.3); empty for a random start."""
        if self.start == "random":
            return {}
        return magnitude(model) if self.start == "magnitude" else fisher(model, iter(batches), self.fisher_samples)
