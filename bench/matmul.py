"""fp32 matrix products on a CPU by oneDNN, where MKL leaves half of the machine unused.

torch's builds for x86 give every fp32 product to MKL, whose AVX-512 code is for Intel's CPUs alone. torch carries oneDNN too, for
convolutions and for compiled models; its products are as exact (fp32 throughout, summed in another order) and use the whole
width on every maker's CPU. `python -m benchmarks.matmul` measures both.

The two operators that all linear layers and their gradients come down to, `mm` and `addmm`, are given another kernel, as
`torch.library` offers it. Other types, small factors, and layouts that oneDNN would take its reference code for stay torch's.
Which of the two computes a product of rows never depends on their number (but for one alone): a row is the same beside others.
A weight's gradient, whose first factor lies by columns, sums over the rows: there their number decides.

oneDNN compiles a kernel for each shape, in 0.2 to 0.8 ms, and keeps the last 1,024. Packed batches have another number of tokens at
every step: small products of many rows are brought up to a multiple of 16 of them by rows of zeros, the same to the bit.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST = 2**12  # numbers of the second factor; below, thousands of rows alone gain back oneDNN's start (10 us)
WORK = 2**20  # multiplications of the gradient of a weight, which sums over rows: likewise
MULTIPLE = 16  # of rows
MANY = 64  # rows: of fewer there are few shapes
SMALL = 2**25  # multiplications: in a larger product a compilation is soon forgotten
_kernels: Any = None  # while they stand


def use(name: str) -> None:
    """Compute the products of this process as `matmul=name` says. Raises ValueError where torch has no oneDNN."""
    global _kernels
    if name == "onednn" and not available():
        raise ValueError(
            f"matmul=onednn: torch {torch.__version__} has no oneDNN here; use matmul=auto or matmul=torch"
        )
    wanted = name == "onednn" or (name == "auto" and available() and _narrow())
    if wanted and _kernels is None:
        _kernels = kernels({"mm": _mm, "addmm": _addmm})
    elif not wanted:
        _kernels = None  # torch's own stand again


def kernels(own: dict[str, Callable[..., Tensor]]) -> Any:
    """Give operators of torch other kernels on a CPU, by their names, for as long as the result is held on to."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, kernel in own.items():
            library.impl(name, kernel, "CPU")
    return library


def used() -> str:
    """What computes products now: "onednn", or "torch"."""
    return "torch" if _kernels is None else "onednn"


def threads(count: int) -> None:
    """Give torch this many threads; to say so anew, as torch does it, would make oneDNN forget the kernels it has compiled."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@cache
def available() -> bool:
    """Whether this torch has oneDNN, and its linear layer for plain tensors."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _narrow() -> bool:
    """Whether MKL computes with half of this CPU's width: AVX-512, and not made by Intel."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.backends.mkl.is_available() and wide and not intel()


@cache
def intel() -> bool:
    """Whether Intel made this CPU."""
    info = Path("/proc/cpuinfo")
    return "Intel" in (info.read_text() if info.exists() else platform.processor())


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _fit(a, b):
        return _product(a, b, None)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _fit(a, b) and beta == alpha == 1 and bias.shape == b.shape[1:] and bias.is_contiguous():
        return _product(a, b, bias)
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    sums = not a.is_contiguous()  # over the rows, the gradient of a weight
    if sums and bias is None and b.is_contiguous() and b.shape[1] < a.shape[0]:
        # oneDNN's operator turns its first factor round: let that be the narrow one
        return _product(b.t(), a.t(), None).t().contiguous()
    rows = a.shape[1] if sums else a.shape[0]
    more = -rows % MULTIPLE
    if not more or rows < MANY or a.numel() * b.shape[1] > SMALL:
        return _onednn(a, b, bias)
    if sums:
        return _onednn(_longer(a.t(), more).t(), _longer(b, more), bias)
    return _onednn(_longer(a, more), b, bias)[:rows].clone()  # whose memory ends with it


def _longer(x: Tensor, more: int) -> Tensor:
    return torch.cat([x, x.new_zeros(more, x.shape[1])])


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")
    return found


def _fit(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN computes a (n, k) times b (k, m), and sooner."""
    if b.numel() < LEAST or not a.dtype == b.dtype == torch.float32:
        return False
    if not a.is_contiguous() and a.numel() * b.shape[1] < WORK:
        return False
    return a.shape[0] > 1 and a.shape[1] == b.shape[0] and _dense(a) and _dense(b)


def _dense(x: Tensor) -> bool:
    """Whether its numbers lie in memory without gaps, by rows or by columns."""
    return x.is_contiguous() or x.t().is_contiguous()
