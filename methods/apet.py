"""APET: parameters at random positions of the weights, a control for every design. Su et al., https://arxiv.org/abs/2306.02320"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.architectures import role
from methods.base import Adapted, Batch, Method, Unsupported, adapt_linears, new_parameter, register


class SparselyChanged(torch.autograd.Function):
    """x (W + D)^T + b for the sparse D (out, in) of `values` (k,) at the flat positions `index` (k,) of a frozen W.

    W + D is built in forward and again in backward and is not kept; neither is its dense gradient, of which k entries count.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, values, index, weight)
        return F.linear(x, changed(weight, values, index), None if bias is None else bias.to(values.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:  # type: ignore[override]
        x, values, index, weight = ctx.saved_tensors
        back = grad @ changed(weight, values, index).to(grad.dtype) if ctx.needs_input_grad[0] else None
        full = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
        return None if back is None else back.to(x.dtype), full.flatten()[index].to(values.dtype), None, None, None


def changed(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W + D in the dtype of `values`."""
    whole = weight.detach().to(values.dtype, copy=True)
    whole.view(-1).index_add_(0, index, values.detach())
    return whole


def dense(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of `shape` that is `values` at the flat positions `index` and zero elsewhere."""
    return values.new_zeros(shape[0] * shape[1]).index_put((index,), values).view(shape)


class SparseLinear(Adapted):
    """h = W0 x + D x with D zero but at `index`, where its trained entries start at zero."""

    base: nn.Linear
    index: Tensor

    def __init__(self, base: nn.Linear, index: Tensor):
        super().__init__(base)
        self.values = new_parameter(base, len(index))
        self.register_buffer("index", index.to(self.values.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        y = SparselyChanged.apply(x.to(self.values.dtype), self.values, self.index, base.weight, base.bias)  # type: ignore[no-untyped-call]
        return y.to(x.dtype) if y.dtype == self.values.dtype else y  # under autocast it has that dtype already

    def weight(self) -> Tensor:
        return self.base.weight + dense(self.values, self.index, (self.base.out_features, self.base.in_features))


@register
@dataclass
class APET(Method):
    """Section 3.2, operation ADD: `parameters` trained entries, uniformly without replacement over the target weights.

    Null takes as many as `lora` of rank `rank` trains on query and value, so that only the design differs (section
    4.1 gives each method a control of its size). Adam's steps are those of full fine-tuning under a mask.
    """

    lr: ClassVar[float] = 1e-4  # of the released scripts' README
    family: ClassVar[str] = "selective"
    acts: ClassVar[str] = "random entries of all linear layers"
    formula: ClassVar[str] = "K, by default those of lora"
    mergeable: ClassVar[bool] = True

    parameters: int | None = None  # K; the paper sweeps it
    rank: int = 8
    targets: str = "all_linear"

    def __post_init__(self) -> None:
        if min(self.rank, self.rank if self.parameters is None else self.parameters) < 1:
            raise ValueError(f"method.parameters={self.parameters} and method.rank={self.rank} must be at least 1")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        count = self.parameters or self.rank * sum(sum(m.weight.shape) for m in chosen(model, "query_value"))
        sizes = [m.weight.numel() for m in chosen(model, self.targets)]
        if count > sum(sizes):
            raise Unsupported(f"method.parameters={count} is more than the {sum(sizes)} entries of the target weights")
        shares = iter(split(positions(count, sum(sizes)), sizes))
        adapt_linears(model, self.targets, lambda base: SparseLinear(base, next(shares)))
        return model


def chosen(model: nn.Module, targets: str) -> list[nn.Linear]:
    """The frozen linear layers that `targets` names, in the order in which `adapt_linears` takes them."""
    pattern = re.compile(role(model, targets))
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and pattern.search(n)]
    return [m for m in linears if not m.weight.requires_grad]


def positions(count: int, total: int) -> Tensor:
    """`count` of range(total), sorted: each subset as likely as any other. Drawn on the CPU, the same on every device."""
    if count > total // 2:
        return torch.randperm(total, device="cpu")[:count].sort().values
    found = torch.empty(0, dtype=torch.long, device="cpu")
    while len(found) < count:  # draw what is missing and drop what was there already
        found = torch.cat([found, torch.randint(total, (count - len(found),), device="cpu")]).unique()
    return found


def split(index: Tensor, sizes: list[int]) -> list[Tensor]:
    """Sorted positions in the concatenation of layers of `sizes`, as positions in each of them."""
    ends = torch.tensor(sizes, device="cpu").cumsum(0)
    parts = index.tensor_split(torch.searchsorted(index, ends[:-1]))
    return [part - (end - size) for part, end, size in zip(parts, ends, sizes, strict=True)]
