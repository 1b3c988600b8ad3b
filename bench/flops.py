"""FLOPs of a computation, by torch's operator counter with the operators that it lacks.

A multiply-add is two. Counted: matrix products, convolutions, attention, linear solves and FFTs, in forward and backward;
not elementwise operations. A causal mask takes nothing off, and an attention kernel that computes its scores again in the
backward is counted as doing so. The count depends on shapes only: not on the device's speed, nor on the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Shape = Sequence[int]


def flops(run: Callable[[], object]) -> int:
    """FLOPs of `run()`."""
    with counting() as counter:
        run()
    return int(counter.get_total_flops())


def counting() -> FlopCounterMode:
    """A context that counts; `get_total_flops()` may be asked inside it too.

    Without torch's tracker of modules, whose hooks fail where a module's input is itself a parameter (a prompt).
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    return counter


class _Whole(nullcontext[None]):
    """Counts everything as one module."""

    parents = ("Global",)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and mixture: 2bhst(d + e) for query (b, h, s, d), key (b, h or fewer, t, d), value (b, h or fewer, t, e)."""
    b, h, s, d = query
    return 2 * b * h * s * value[-2] * (d + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores again, dQ and dK: 2bhstd each; dP and dV: 2bhste each."""
    b, h, s, d = query
    return 2 * b * h * s * value[-2] * (3 * d + 2 * value[-1])


def _mv(matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _addmv(start: Shape, matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _dot(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a)


def _inverse(matrix: Shape, *_: Any, **__: Any) -> int:
    """2n^3 by LU."""
    return 2 * math.prod(matrix) * matrix[-1]


def _solve(matrix: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """LU (2/3 n^3) and two triangular solves (n^2 each per right-hand side, a multiply-add being two)."""
    n = matrix[-1]
    return math.prod(matrix[:-2]) * (2 * n**3 // 3) + 2 * n * math.prod(right)


def _lu(matrix: Shape, *_: Any, **__: Any) -> int:
    """mn^2 - n^3/3 multiply-adds' two halves, n the smaller side: 2/3 n^3 for a square matrix."""
    m, n = max(matrix[-2:]), min(matrix[-2:])
    return math.prod(matrix[:-2]) * (m * n**2 - n**3 // 3)


def _lu_solve(lu: Shape, pivots: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * lu[-1] * math.prod(right)


def _triangular(matrix: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return matrix[-1] * math.prod(right)


def _fft(shape: Shape, dims: Sequence[int], *_: Any, **__: Any) -> int:
    """5 N log2 N over the transformed length N, the usual convention for a complex FFT."""
    length = math.prod(shape[d] for d in dims)
    return round(5 * math.prod(shape) * math.log2(max(length, 1)))


def _real_fft(shape: Shape, dims: Sequence[int], *rest: Any, **named: Any) -> int:
    return _fft(shape, dims) // 2


def _complex_to_real(shape: Shape, dims: Sequence[int], norm: int, size: int, *_: Any, **__: Any) -> int:
    full = list(shape)
    full[dims[-1]] = size  # the input holds one half of the spectrum
    return _fft(full, dims) // 2


_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.mv: _mv,
    aten.addmv: _addmv,
    aten.dot: _dot,
    aten.linalg_inv_ex: _inverse,
    aten._linalg_solve_ex: _solve,
    aten.linalg_lu_factor_ex: _lu,
    aten.linalg_lu_solve: _lu_solve,
    aten.linalg_solve_triangular: _triangular,
    aten._fft_c2c: _fft,
    aten._fft_r2c: _real_fft,
    aten._fft_c2r: _complex_to_real,
}
