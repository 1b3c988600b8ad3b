"""APET: parameters at random positions of the weights, a control for every design. Su et al., https://arxiv.org/abs/2306.02320"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from methods.architectures import role
from methods.base import Batch, Method, Unsupported, adapt_linears, new_parameter, register
from methods.rebuilt import Rebuilt

DENSE = 24  # entries of a weight for each that is trained: with fewer, its whole gradient is computed sooner than they alone
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@torch.library.custom_op("paretune::entries", mutates_args=(), schema="(Tensor a, Tensor b, Tensor index) -> Tensor")
def entries(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Of a^T b, with a (rows, m) and b (rows, n), what is at the sorted flat positions `index` (k,), and nothing else."""
    m, n = a.shape[1], b.shape[1]
    starts = torch.searchsorted(index, torch.arange(0, m * n + 1, n, device=index.device))
    pattern = torch.sparse_csr_tensor(starts, index % n, a.new_zeros(len(index)), (m, n), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, a.T, b, beta=0.0).values()


@entries.register_fake
def _(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    return a.new_empty(len(index))


@register_flop_formula(torch.ops.paretune.entries)
def _flops(a: torch.Size, b: torch.Size, index: torch.Size, **_: Any) -> int:
    return 2 * a[0] * index[0]


def dense(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of `shape` that is `values` at the flat positions `index` and zero elsewhere."""
    return values.new_zeros(shape[0] * shape[1]).index_put((index,), values).view(shape)


class SparseLinear(Rebuilt):
    """h = W0 x + D x with D zero but at `index`, where its trained entries start at zero."""

    base: nn.Linear
    index: Tensor

    def __init__(self, base: nn.Linear, index: Tensor):
        super().__init__(base)
        self.values = new_parameter(base, len(index))
        self.register_buffer("index", index.to(self.values.device), persistent=False)

    def changed(self, values: Tensor) -> Tensor:  # type: ignore[override]
        whole = self.base.weight.detach().to(values.dtype, copy=True)
        whole.view(-1).index_add_(0, self.index, values)
        return whole

    def gradients(self, grad: Tensor, x: Tensor, values: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        if len(self.index) * DENSE > self.base.weight.numel() or grad.device.type not in ("cpu", "cuda"):
            return ((grad.T @ x).flatten()[self.index].to(values.dtype),)
        return (entries(grad.to(values.dtype), x.to(values.dtype), self.index),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.values)
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
