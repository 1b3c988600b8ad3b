"""A layer whose changed weight is built when it is needed, and never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted


class Rebuilt(Adapted):
    """x W^T + b for a W of the frozen weight and of `values`, trained vectors in whose dtype all is computed."""

    def changed(self, *values: Tensor) -> Tensor:
        """The (out, in) weight that the layer acts with."""
        raise NotImplementedError

    def gradients(self, grad: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Those of `values`, from those of the outputs (rows, out) and from the inputs (rows, in)."""
        raise NotImplementedError

    def product(self, x: Tensor, *values: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return _Product.apply(self, x.to(values[0].dtype), self.base.bias, *values)  # type: ignore[no-untyped-call, no-any-return]

    def rebuilds(self, x: Tensor, rank: int, dtype: torch.dtype) -> bool:
        """Whether a W with a change of `rank` costs fewer products than the change beside it, for the rows of x (..., in).

        W (m, n) is built twice, and its values' gradients come of its own: r m n each, and m n rows; beside it are
        2 r (m + n) rows. A frozen weight in half precision stays in it, one that is trained has a gradient of its own, and
        another method may stand in the frozen layer's place.
        """
        base, rows = self.base, x.shape[:-1].numel()
        if not isinstance(base, nn.Linear) or base.weight.dtype != dtype or base.weight.requires_grad:
            return False
        m, n = base.weight.shape
        return (3 * rank + rows) * m * n < 2 * rank * (m + n) * rows


class _Product(torch.autograd.Function):
    """W is built in forward and again in backward; its dense gradient goes no further."""

    @staticmethod
    def forward(ctx: Any, layer: Rebuilt, x: Tensor, bias: Tensor | None, *values: Tensor) -> Tensor:
        ctx.save_for_backward(x, *values)
        ctx.layer = layer
        weight = layer.changed(*(v.detach() for v in values))
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, *values), rows = ctx.saved_tensors, grad.flatten(0, -2)
        _, into_x, into_bias, *into_values = ctx.needs_input_grad
        back = (grad @ ctx.layer.changed(*values).to(grad.dtype)).to(x.dtype) if into_x else None
        found: tuple[Tensor | None, ...] = (None,) * len(values)
        if any(into_values):
            found = ctx.layer.gradients(rows, x.flatten(0, -2).to(grad.dtype), *values)
        return None, back, rows.sum(0) if into_bias else None, *found
