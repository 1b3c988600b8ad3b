"""PiSSA: LoRA that starts at the principal singular values of each weight. Meng et al., https://arxiv.org/abs/2404.02948"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from methods.base import Adapted, Unsupported, register
from methods.lora import LoRA, LoRALinear


@torch.no_grad()
def principal(W: Tensor, rank: int, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of W (out, in): U (out, rank), S (rank,), V^T (rank, in), at least in float32.

    `iterations` of the randomised SVD, null for the exact one. The largest entry of each left vector is positive: a
    library's choice of sign must not decide what a stored adapter means. Raises `Unsupported` beyond W's own rank.
    """
    if rank > min(W.shape):
        raise Unsupported(
            f"method.rank={rank}, but a weight of shape {tuple(W.shape)} has {min(W.shape)} singular values: "
            "give a smaller rank, or targets without that layer"
        )
    W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    if iterations is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=rank, niter=iterations)
        Vh = V.T
    U, S, Vh = U[:, :rank], S[:rank].clone(), Vh[:rank]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, rank)
    return U * sign, S, Vh * sign.T


class PiSSALinear(LoRALinear):
    """Equations 2 to 4: A = S_r^1/2 V_r^T, B = U_r S_r^1/2 are trained, beside the frozen residual W0 - B A.

    The residual takes the place of `base.weight` in a tensor of its own, so that whoever holds W0 keeps it;
    `weight()` is W0 at the start.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float, iterations: int | None):
        super().__init__(base, rank, scale, dropout)
        U, S, Vh = principal(base.weight, rank, iterations)
        root = (S / scale).sqrt()
        with torch.no_grad():
            self.A.copy_(root[:, None] * Vh)
            self.B.copy_(U * root)
            residual = base.weight - scale * self.B @ self.A
        base.weight = nn.Parameter(residual.to(base.weight.dtype), requires_grad=False)


@register
@dataclass
class PiSSA(LoRA):
    """Principal singular values and vectors adaptation, on the layers and at the rank of `lora` so that the two compare.

    `iterations` of the randomised SVD (4 and 16 in the released code) in place of the exact one: faster
    at the start, and the model is still exactly the pretrained one.
    """

    lr: ClassVar[float] = 2e-5  # released scripts: LLaMA-2-7B at rank 128

    alpha: float | None = None  # type: ignore[assignment]  # the paper's alpha = rank, that is s = 1
    iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(f"method.iterations={self.iterations} must be at least 0, or null for the exact SVD")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else super().scale

    def layer(self, base: nn.Linear) -> Adapted:
        return PiSSALinear(base, self.rank, self.scale, self.dropout, self.iterations)
