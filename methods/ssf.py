"""SSF: a trained scale and shift after every operation, merged at the end. Lian et al., https://arxiv.org/abs/2210.08823"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from methods.base import Adapted, Batch, Method, adapt_linears, new_parameter, register


class ScaleShift(Adapted):
    """Equation 3: y = gamma * op(x) + beta over the last dimension of the output of a layer.

    Folded (equation 6) into a linear layer, norm or convolution: gamma W and gamma b + beta. A layer without a bias
    has nowhere to keep beta, so it gets none: merged, every model has its pretrained shape.
    """

    def __init__(self, base: nn.Module, std: float):
        super().__init__(base)
        weight: Any = self.owner().weight
        self.scale = new_parameter(base, len(weight))
        self.shift = new_parameter(base, len(weight)) if getattr(self.owner(), "bias", None) is not None else None
        nn.init.normal_(self.scale, 1.0, std)
        if self.shift is not None:
            nn.init.normal_(self.shift, 0.0, std)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base(*args, **kwargs)
        scaled = y * self.scale
        return (scaled if self.shift is None else scaled + self.shift).to(y.dtype)

    def weight(self) -> Tensor:
        weight: Any = self.owner().weight
        one = 1.0 if type(self.base).__name__.startswith("Gemma") else 0.0  # its norms multiply by 1 + weight
        return (weight + one) * self.scale.view(-1, *[1] * (weight.dim() - 1)) - one

    def bias(self) -> Tensor | None:
        bias: Any = getattr(self.owner(), "bias", None)
        return None if self.shift is None else bias * self.scale + self.shift


class ScaledNorm(ScaleShift):
    """The same behind a layer norm, folded into its own scale and shift: its output is neither kept nor gone over again."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.scale.dtype:  # half precision would round the folded scale
            return super().forward(x)
        folded: Any = {"weight": self.weight()} | ({} if self.shift is None else {"bias": self.bias()})
        return functional_call(self.base, folded, (x,))  # type: ignore[no-any-return]


class ScaledPatches(ScaleShift):
    """The same behind a patch embedding, (batch, patches, size), whose convolution takes the change in."""

    @property
    def projection(self) -> nn.Module:
        return self.base.projection  # type: ignore[return-value]

    def owner(self) -> nn.Module:
        return self.projection


@register
@dataclass
class SSF(Method):
    """Scale and shift after the patch embedding, each norm and each linear layer of a block (section 3.2, figure 2).

    Text models have no patch embedding; the rest is the same there. As in the official code, neither the attention's
    product nor the activation counts as an operation.
    """

    lr: ClassVar[float] = 5e-3  # official scripts, most of VTAB-1k; per data set from 2e-4 to 5e-2
    family: ClassVar[str] = "scale"
    acts: ClassVar[str] = "outputs of linear layers, norms and patch embedding"
    formula: ClassVar[str] = "2 (11 L + 2) d; without biases one per output"
    mergeable: ClassVar[bool] = True
    neutral: ClassVar[bool] = False  # near the pretrained model: standard deviation `init_std`

    init_std: float = 0.02  # of gamma around 1 and beta around 0 in the official code

    def __post_init__(self) -> None:
        if self.init_std < 0:
            raise ValueError(f"method.init_std={self.init_std} must not be negative; 0 starts as the pretrained model")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        adapt_linears(model, "all_linear", lambda base: ScaleShift(base, self.init_std))
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("Norm") and not next(module.parameters()).requires_grad:
                kind = ScaledNorm if isinstance(module, nn.LayerNorm) else ScaleShift
                model.set_submodule(name, kind(module, self.init_std))
            elif isinstance(getattr(module, "projection", None), nn.Conv2d) and not isinstance(module, Adapted):
                model.set_submodule(name, ScaledPatches(module, self.init_std))
        return model
