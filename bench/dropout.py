"""Dropout on a CPU: its masks, and attention's softmax under it, without what torch spends on them there.

torch draws a mask number by number from its Mersenne Twister, two draws each, in one thread (but on Intel's CPUs, by MKL): a
fifth of the step of `lst`'s narrow network. Here it seeds an SFC64 generator (numpy's), whose 32 bits are compared with p:
four times as fast for large masks. Attention with dropout has torch's safe softmax, which searches all scores for rows with
no key; here the first number of each row of the result tells, where such a row is not a number.

Both operators are given another kernel, as `torch.library` offers it. The softmax is the same to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from bench.matmul import intel, kernels

_kernels: Any = None  # while they stand


def use(ours: bool = True) -> None:
    """Compute the dropout of this process so, or as torch does. On Intel's CPUs torch draws its masks by MKL either way."""
    global _kernels
    if ours and _kernels is None:
        masks = {} if intel() else {"bernoulli_.float": _bernoulli}
        _kernels = kernels({"_safe_softmax": _softmax, **masks})
    elif not ours:
        _kernels = None  # torch's own stand again


def _bernoulli(x: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill x with ones of probability p, to 32 bits, and zeros. Raises ValueError where p is no probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"bernoulli_ needs a probability between 0 and 1, not {p}")
    bound = round(p * 2**32) - 2**31
    if bound >= 2**31:  # beyond all 32-bit numbers
        return x.fill_(1)
    seed: Any = _Seed(generator)  # numpy's stubs know no ISeedSequence
    drawn = np.random.SFC64(seed).random_raw((x.numel() + 1) // 2).view(np.int32)[: x.numel()]
    return torch.lt(torch.from_numpy(drawn).view(x.shape), bound, out=x)


class _Seed(ISeedSequence):
    """What torch's generator draws, for numpy's to begin with: SFC64 asks for three times 64 bits."""

    def __init__(self, generator: torch.Generator | None):
        self.generator = generator

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        bits = torch.empty(n_words, dtype=torch.int64).random_(-(2**63), None, generator=self.generator)
        return bits.numpy().view(np.uint64).astype(dtype, copy=False)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax, with zeros where all along `dim` is minus infinity."""
    found = torch.softmax(x, dim, dtype)
    if not x.numel() or not found.select(dim, 0).isnan().any():
        return found
    return found.masked_fill_(x.isneginf().all(dim, keepdim=True), 0.0)
