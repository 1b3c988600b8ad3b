"""NOLA: LoRA's factors as mixtures of random matrices made anew from a seed. Koohpayegani et al., arxiv.org/abs/2310.02556"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Adapted, new_parameter, register
from methods.lora import LoRA

AT_ONCE = 2**20  # numbers of the bases that exist at one time; few enough for a CPU's caches


def numbers(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Numbers `first` to `first + count` of the uniform stream `seed` in [-1, 1], (count,) in float32.

    Each output of SplitMix64, a function of its position alone, gives two: the same on every device, which torch's
    generators are not, and from anywhere.
    """
    z = torch.arange(first // 2 + 1, (first + count + 1) // 2 + 1, device=device)
    z.mul_(-0x61C8864680B583EB).add_(seed)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(
            factor
        )  # a logical shift of signed integers
    return z.view(torch.int32)[first % 2 :][:count].float().mul_(2.0**-31)


class Mixture(torch.autograd.Function):
    """sum_i c_i G_i for coefficients c (k,) and bases G_i of `shape`, uniform in [-1, 1] / sqrt(k).

    The sum is linear in c, so that the backward pass needs nothing but the bases, which it makes again.
    """

    @staticmethod
    def bases(k: int, seed: int, shape: tuple[int, int], like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """sqrt(k) times the bases in groups: their places, and (group, rows * columns)."""
        size = shape[0] * shape[1]
        group = max(1, AT_ONCE // size)
        for i in range(0, k, group):
            count = min(group, k - i)
            values = numbers(seed, i * size, count * size, like.device)
            yield slice(i, i + count), values.view(count, size).to(like.dtype)

    @staticmethod
    def forward(ctx: Any, c: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
        ctx.k, ctx.seed, ctx.shape = len(c), seed, shape
        total = c.new_zeros(shape[0] * shape[1])
        for places, G in Mixture.bases(len(c), seed, shape, c):
            total += c[places] @ G
        return (total / math.sqrt(len(c))).view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].flatten() / math.sqrt(ctx.k)
        return torch.cat([G @ grad for _, G in Mixture.bases(ctx.k, ctx.seed, ctx.shape, grad)]), None, None


class NOLALinear(Adapted):
    """h = W0 x + s B A x, A = A0 + sum_i a_i A_i (rank, in), B = sum_j b_j B_j (out, rank); a and b start at zero.

    A0 is LoRA's own start, frozen: without it neither a nor b would ever get a gradient.
    """

    base: nn.Linear
    A0: Tensor

    def __init__(self, base: nn.Linear, rank: int, scale: float, bases: tuple[int, int], dropout: float):
        super().__init__(base)
        self.a, self.b = (new_parameter(base, k) for k in bases)
        A0 = torch.empty(rank, base.in_features, device="cpu")  # the same numbers from a seed on every device
        nn.init.kaiming_uniform_(A0, a=math.sqrt(5))
        self.register_buffer("A0", A0.to(self.a), persistent=False)
        self.seeds = [int(s) for s in torch.randint(2**62, (2,), device="cpu")]
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        rank, m = len(self.A0), self.base.out_features
        A = self.A0 + Mixture.apply(self.a, self.seeds[0], tuple(self.A0.shape))
        return A, Mixture.apply(self.b, self.seeds[1], (m, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        A, B = self.factors()
        return y + (F.linear(F.linear(self.dropout(x.to(A.dtype)), A), B) * self.scale).to(y.dtype)

    def weight(self) -> Tensor:
        A, B = self.factors()
        return self.base.weight + self.scale * B @ A


@register
@dataclass
class NOLA(LoRA):
    """Linear combinations of low-rank random bases: the count depends neither on the rank nor on the width.

    `bases_a` and `bases_b` are the paper's k and l. The released code makes all bases at once; this file makes them in
    groups, as the paper says, forward and again backward.
    """

    lr: ClassVar[float] = 5e-3  # gpt/scripts/finetune_gpt2m_e2e_qv_nola.sh of the released code, without weight decay
    formula: ClassVar[str] = "k + l per layer"
    oracle: ClassVar[str] = "closed form"

    rank: int = 8  # this and alpha: the same script, with 512 bases there
    alpha: float = 8.0
    bases_a: int = 1024  # this and the next: README of the released code
    bases_b: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bases_a", "bases_b"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name}={getattr(self, name)} must be at least 1")

    def layer(self, base: nn.Linear) -> Adapted:
        return NOLALinear(base, self.rank, self.scale, (self.bases_a, self.bases_b), self.dropout)
