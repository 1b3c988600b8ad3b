"""A layer whose changed weight is built when it is needed, and never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import Adapted


class Rebuilt(Adapted):
    """x W^T + b for a W of the frozen weight and `values`, a trained vector in whose dtype all is computed."""

    def changed(self, values: Tensor) -> Tensor:
        """The (out, in) weight that the layer acts with."""
        raise NotImplementedError

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """That of `values`, from those of the outputs (rows, out) and the inputs (rows, in)."""
        raise NotImplementedError

    def product(self, x: Tensor, values: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        bias = self.base.bias
        return _Product.apply(x.to(values.dtype), values, bias, self)  # type: ignore[no-untyped-call, no-any-return]


class _Product(torch.autograd.Function):
    """The weight is built in forward and again in backward; its dense gradient is no one's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: Rebuilt) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return F.linear(x, layer.changed(values.detach()), None if bias is None else bias.to(values.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values = ctx.saved_tensors
        rows, back, found, bias = grad.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            back = (grad @ ctx.layer.changed(values).to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            found = ctx.layer.gradient(rows, x.flatten(0, -2).to(grad.dtype)).to(values.dtype)
        if ctx.needs_input_grad[2]:
            bias = rows.sum(0)
        return back, found, bias, None
