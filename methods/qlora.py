"""QLoRA: LoRA on all linear layers of a base in 4 or 8 bits. Dettmers et al., https://arxiv.org/abs/2305.14314"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from methods.base import Adapted, register, searched
from methods.lora import LoRA, LoRALinear

BLOCK, SCALES = 64, 256  # weights per scale; scales per scale of scales (section 3)
# Appendix E: the quantiles of a normal distribution, with an exact zero, scaled to [-1, 1]
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


@cache
@_disable_current_modes()  # whoever asks first: what is kept has numbers
def code_book(kind: str, device: torch.device) -> Tensor:
    """The values that codes stand for, ascending: `nf4` (16,), `float8` (256,) for the scales; `nf4_pairs` (256,) of a byte.

    A pair is one complex number, which is looked up four times as fast as a row of two.

    The last is the dynamic 8-bit float of Dettmers et al., https://arxiv.org/abs/2110.02861: 2^i values between
    0.1 and 1 times 10^(i - 6), i = 0 to 6, with both signs, and 0 and 1.
    """
    if kind == "nf4":
        return torch.tensor(NF4, device=device)
    if kind == "nf4_pairs":
        return torch.view_as_complex(torch.cartesian_prod(*2 * [code_book("nf4", device)]))
    with torch.device("cpu"):  # wherever the model is being built
        edges = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
        positive = torch.cat([(e[1:] + e[:-1]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)])
        return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def quantise(values: Tensor, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (blocks, block) uint8 of the nearest values of a code book, and the largest |value| (blocks,) of each block."""
    blocks = F.pad(values.flatten(), (0, -values.numel() % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    book = code_book(kind, values.device)
    middles = (book[1:] + book[:-1]) / 2
    scaled = blocks / largest.clamp_min(torch.finfo(blocks.dtype).tiny)[:, None]
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8), largest


def lookup(codes: Tensor, kind: str) -> Tensor:
    """The values of `codes`, of the same shape; float32, pairs complex64."""
    return code_book(kind, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


class PackedLinear(nn.Module):
    """A frozen linear layer that stores codes for its weight. Subclasses set `packed` and say what the codes stand for."""

    packed: nn.Parameter

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.pack(linear.weight.detach().float())
        self.packed.stands_for = linear.weight.numel()  # type: ignore[attr-defined]
        self.bias = linear.bias

    def pack(self, weight: Tensor) -> None:
        """Keep codes for the (out, in) weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight that the codes stand for, built anew, in the dtype that the layer had."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self)

    def dense(self) -> nn.Linear:
        """The plain layer of the same function."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear


class Int8Linear(PackedLinear):
    """8 bits per weight and one scale per output, the largest |weight| of its row: the weight of LLM.int8.

    Dettmers et al., https://arxiv.org/abs/2208.07339, section 3.1, for the weight alone: inputs are not quantised.
    """

    def pack(self, weight: Tensor) -> None:
        largest = weight.abs().amax(1, keepdim=True)
        codes = (weight / largest.clamp_min(torch.finfo(weight.dtype).tiny) * 127).round()
        self.packed = nn.Parameter(codes.to(torch.int8), requires_grad=False)
        self.register_buffer("scales", largest / 127, persistent=False)

    @property
    def weight(self) -> Tensor:
        scales: Tensor = self._buffers["scales"]  # type: ignore[assignment]
        return (self.packed * scales).to(self.dtype)


class NF4Linear(PackedLinear):
    """4.127 bits per weight: 4-bit codes and doubly quantised scales (equation 6)."""

    def pack(self, weight: Tensor) -> None:
        codes, scales = quantise(weight, BLOCK, "nf4")
        self.packed = nn.Parameter(codes[:, ::2] << 4 | codes[:, 1::2], requires_grad=False)
        mean = scales.mean()  # scales are positive: centred, the signed floats fit them
        scale_codes, largest = quantise(scales - mean, SCALES, "float8")
        self.register_buffer("scales", scale_codes.flatten()[: len(scales)].clone(), persistent=False)
        self.register_buffer("largest", largest, persistent=False)
        self.register_buffer("mean", mean, persistent=False)

    @property
    def weight(self) -> Tensor:
        state: dict[str, Any] = self._buffers
        largest = state["largest"].float().repeat_interleave(SCALES)[: len(state["scales"])]
        scales = lookup(state["scales"], "float8") * largest + state["mean"].float()
        pairs = torch.view_as_real(lookup(self.packed, "nf4_pairs"))
        values = pairs.flatten(1).mul_(scales[:, None])  # 6 bytes per weight live at once
        dense = values.flatten()[: self.in_features * self.out_features]
        return dense.view(self.out_features, self.in_features).to(self.dtype)


class Product(torch.autograd.Function):
    """W x + b with a weight that neither pass keeps: the backward builds it again from its codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


PACKINGS: dict[int, type[PackedLinear]] = {4: NF4Linear, 8: Int8Linear}


class QLoRALinear(LoRALinear):
    """LoRA beside a packed layer."""

    def unpack(self) -> None:
        self.base = self.base.dense()  # type: ignore[operator]


@register
@dataclass
class QLoRA(LoRA):
    """The target layers are quantised to NF4 with double quantisation, or to 8 bits, and LoRA is trained beside them.

    Starts as the *quantised* model, and merges into its de-quantised weights. Codes, scales and their layout are those
    of the authors' library bitsandbytes, which is not needed. Paged optimizers are no part of this.
    """

    lr: ClassVar[float] = 2e-4  # appendix B: 7B and 13B
    family: ClassVar[str] = "quantised"
    acts: ClassVar[str] = "weights of all linear layers, which are kept in 4 or 8 bits"
    oracle: ClassVar[str] = "bitsandbytes, closed form"
    neutral: ClassVar[bool] = False  # quantising moves every weight

    rank: int = 64  # this and the next two: appendix B
    alpha: float = 16.0
    dropout: float = searched(0.1, (0.0, 0.05, 0.1))
    targets: str = "all_linear"
    bits: int = 4  # 8: see `Int8Linear`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in PACKINGS:
            raise ValueError(f"method.bits={self.bits}: the options are {', '.join(map(str, PACKINGS))}")

    def layer(self, base: nn.Linear) -> Adapted:
        packed: Any = PACKINGS[self.bits](base)
        return QLoRALinear(packed, self.rank, self.scale, self.dropout)
