"""The spectrum of what fine-tuning did to one weight matrix: intruder dimensions and their companions.

Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence", https://arxiv.org/abs/2410.21228: a singular
vector of the tuned matrix is an intruder where its absolute cosine with every pretrained one is below epsilon (definition
3.1), counted among the k largest (algorithm 1). The paper counts left vectors; here both sides are told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from analysis.decompose import Svd, cached, first, full, top
from analysis.gram import Gram, thin
from analysis.low_rank import guess, low_rank

if TYPE_CHECKING:
    import pandas as pd

K, EPSILON = 10, 0.5  # the paper's headline
EPSILONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RANK_ERROR = 1e-3  # relative, of an effective rank
TIE = 1e-5  # |cosine - epsilon| below which rounding decides


def measure(W0: Tensor, W1: Tensor, k: int = K, folder: Path | None = None, exact: bool = False) -> dict[str, Any]:
    """All measures of a pretrained matrix W0 and a tuned one W1, both (out, in); one row of the table.

    k: how many vectors of each matrix (at most min(out, in)). folder: where decompositions of W0 are kept; None: nowhere.
    exact: three full decompositions instead of the fast path, which is the reference of tests and benchmark.
    Raises ValueError for shapes that differ, and for values that are not finite.
    """
    _check(W0, W1)
    k = min(k, *W0.shape)
    row: dict[str, Any] = {"out": W0.shape[0], "in": W0.shape[1], "dtype": str(W1.dtype).removeprefix("torch.")}
    row |= {"dtype_base": str(W0.dtype).removeprefix("torch."), "changed": not torch.equal(W0, W1)}
    base, tuned, change = leading(W0, W1, k, folder, exact)
    row["norm"] = float(base.S.double().norm())
    if not row["changed"]:
        return row | _unchanged(base, k)
    D, noise = W1.float() - W0.float(), rounding(W1)
    row |= compare(base, tuned) | {"error": tuned.error, "solver": tuned.solver}
    found = full(D) if exact else _spectrum(D, change, k, noise.spectral)
    return row | update(base, found, float(D.norm()), noise.spectral)


def leading(
    W0: Tensor, W1: Tensor, k: int = K, folder: Path | None = None, exact: bool = False
) -> tuple[Svd, Svd, Svd | None]:
    """All vectors of W0, the k leading ones of W1, and the decomposition of a change of low rank; as for `measure`."""
    base = full(W0.float()) if folder is None else cached(W0.float(), folder)
    if torch.equal(W0, W1):
        return base, first(base, k), None
    D = W1.float() - W0.float()
    change = None if exact else low_rank(D, rounding(W1).frobenius + 1e-6 * float(D.norm()))
    tuned = first(full(W1), k) if exact else top(W1.float(), k, *guess(base, change, k))
    return base, tuned, change


def _check(W0: Tensor, W1: Tensor) -> None:
    if W0.shape != W1.shape or W0.dim() != 2:
        raise ValueError(f"a pair of equal (out, in) matrices is needed, not {tuple(W0.shape)} and {tuple(W1.shape)}")
    for name, W in (("pretrained", W0), ("tuned", W1)):
        if not torch.isfinite(W.sum()) and not torch.isfinite(W).all():  # the sum is faster, and may overflow
            raise ValueError(f"the {name} matrix holds NaN or infinity: nothing can be said of its spectrum")


def _unchanged(base: Svd, k: int) -> dict[str, Any]:
    """Each vector is its own; what is measured on a change does not exist."""
    row: dict[str, Any] = {"sigma_before": base.S[:k].tolist(), "sigma_after": base.S[:k].tolist(), "overlap": 1.0}
    for side in ("left", "right"):
        row |= {f"cos_{side}": [1.0] * k, f"index_{side}": list(range(k)), f"window_{side}": [1.0] * k}
    zero = {"norm_ratio": 0.0, "spectral_ratio": 0.0, "numerical_rank": 0}
    return row | {"escape_left": 0.0, "escape_right": 0.0, "error": 0.0, "solver": "unchanged"} | zero


class Rounding(NamedTuple):
    """Norms of the error that storing a matrix in its dtype makes."""

    spectral: float
    frobenius: float


def rounding(W: Tensor) -> Rounding:
    """Upper estimates for W (out, in): half a unit in the last place of each entry, independent of each other.

    What of W1 - W0 lies below is rounding and no update: a merged change of rank r has min(out, in) singular values.
    """
    frobenius = torch.finfo(W.dtype).eps / 2 * float(W.float().norm())
    return Rounding(frobenius * (math.sqrt(W.shape[0]) + math.sqrt(W.shape[1])) / math.sqrt(W.numel()), frobenius)


def _spectrum(D: Tensor, change: Svd | None, k: int, floor: float) -> Svd:
    """Of the change D (out, in): the leading k vectors at least, and all singular values; `error` as `rank_error` of `update`.

    change: its decomposition where that is known. A dense one takes the Gram matrix of its short side: in float32 where the
    bound of the error allows it, else in float64; where that leaves the numerical rank open, `full`.
    """
    if change is not None or min(D.shape) < 128:
        return change or full(D)
    if D.shape[0] < D.shape[1]:
        return _spectrum(D.T, None, k, floor).flip()
    square = len(D) < 2 * D.shape[1]  # about: has values too small for float32
    for dtype in (torch.float64,) if square else (torch.float32, torch.float64):
        gram = Gram(D.to(dtype))
        squares, V = gram.eigen(k)
        error = gram.error(squares)
        S = squares.double().clamp_min(0).sqrt()
        noise = _noise(S, floor)
        bound = _entropy_error(S[noise < S], error)
        if bound < RANK_ERROR and float((squares - noise**2).abs().min()) > error:
            V = V.to(D.dtype)
            return Svd(thin(D, V) / S[:k].to(D.dtype), S, V, bound)
    return full(D)


def _noise(S: Tensor, floor: float) -> float:
    """Singular values S (n) up to here are rounding: of storing the weight, which is `floor`, or of float32 arithmetic."""
    return floor + 4 * torch.finfo(torch.float32).eps * float(S[0])


def _entropy_error(S: Tensor, error: float) -> float:
    """Relative error of `effective_rank` where the squares of S (n) are each exact to `error`, independently of each other.

    To first order: d log(rank) / d s_i = -(log p_i + H) / sum(S), and an error of the square is error / (2 s_i) of the value.
    """
    p = S / S.sum()
    return float((error / (2 * S) * (p.log() - (p * p.log()).sum())).norm() / S.sum())


def compare(base: Svd, tuned: Svd, window: int | None = None) -> dict[str, Any]:
    """Cosines of the tuned leading vectors with all pretrained ones.

    base: all min(out, in) vectors of W0. tuned: the k leading ones of W1. window: vectors of the subspace variant (k).
    Lists have k entries: `cos_*` largest absolute cosine, `index_*` with which pretrained vector, `window_*` the largest
    norm of the projection on `window` pretrained vectors that are neighbours by singular value, which does not fall where
    vectors of nearly equal value only turned into each other. `escape_*`: largest share of a vector outside the span of W0's.
    `overlap`: mean squared canonical correlation of the two leading left subspaces of k.
    """
    k = len(tuned.S)
    row: dict[str, Any] = {"sigma_before": base.S[:k].tolist(), "sigma_after": tuned.S.tolist()}
    for side, old, new in (("left", base.U, tuned.U), ("right", base.V, tuned.V)):
        cosines = thin(old.T, new.to(old.dtype)).abs()
        largest, index = cosines.max(0)
        row[f"cos_{side}"], row[f"index_{side}"] = largest.clamp_max(1).tolist(), index.tolist()
        energy = cosines.double() ** 2
        row[f"window_{side}"] = _windows(energy, window or k).sqrt().clamp_max(1).tolist()
        row[f"escape_{side}"] = float((1 - energy.sum(0)).clamp_min(0).max())
        if side == "left":
            row["overlap"] = float(energy[:k].sum() / k)
    return row


def _windows(energy: Tensor, width: int) -> Tensor:
    """(n, k) to (k): the largest sum of `width` neighbouring rows."""
    sums = torch.cat([energy.new_zeros(1, energy.shape[1]), energy.cumsum(0)])
    width = min(width, len(energy))
    return (sums[width:] - sums[:-width]).max(0).values


def update(base: Svd, change: Svd, norm: float, floor: float) -> dict[str, Any]:
    """Size, ranks and place of the change D = W1 - W0.

    change: its leading vectors and all singular values. norm: its Frobenius norm. floor: singular values that are rounding.

    `norm_ratio`, `spectral_ratio`: against those norms of W0. `effective_rank`: exp of the entropy of S / sum S (Roy and Vetterli
    2007), exact to the share `rank_error` of it; `stable_rank`: sum of S^2 over the largest, `numerical_rank`: how many exceed the
    rounding. `grassmann_left`, `grassmann_right`: ||U_D^T U_W||_F^2 / i with the leading i = min(10, rank) of both (Hu et al.
    2021, equation 4); `amplification`: ||D||_F / ||U_D^T W0 V_D||_F (their section 7.3).
    """
    S0 = base.S.double()
    row: dict[str, Any] = {"norm_ratio": norm / float(S0.norm()), "spectral_ratio": float(change.S[0] / S0[0])}
    S = change.S[_noise(change.S, floor) < change.S]
    row["numerical_rank"] = len(S)
    if not len(S):
        return row
    row |= {"effective_rank": effective_rank(S), "stable_rank": stable_rank(S), "rank_error": change.error}
    i = min(len(S), K, change.U.shape[1])
    u, v = (thin(old.T, new[:, :i].to(old.dtype)) for old, new in ((base.U, change.U), (base.V, change.V)))
    row |= {"grassmann_left": float(u[:i].norm() ** 2 / i), "grassmann_right": float(v[:i].norm() ** 2 / i)}
    inner = float((u.T.double() @ (S0[:, None] * v.double())).norm())
    return row | {"amplification": norm / inner if inner else None}


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the singular values S (n) as shares of their sum: between 1 and n."""
    p = S.double() / S.double().sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(S: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 from the singular values S (n): between 1 and the rank."""
    return float((S.double() ** 2).sum() / S.double().max() ** 2)


def intruders(cosines: Sequence[float], k: int = K, epsilon: float = EPSILON) -> int:
    """How many of the first k largest absolute cosines lie strictly below epsilon (algorithm 1)."""
    return sum(c < epsilon for c in cosines[:k])


def ties(cosines: Sequence[float], k: int = K, epsilon: float = EPSILON) -> int:
    """How many of them lie so close to epsilon that rounding decides."""
    return sum(abs(c - epsilon) < TIE for c in cosines[:k])


@lru_cache
def floor(d: int, n: int, draws: int = 200) -> tuple[float, float]:
    """Mean and largest of max |cos| of a random unit vector of length d with n orthonormal ones, n <= d.

    About sqrt(2 ln n / d): an epsilon below it counts nothing, a cosine near it is no likeness.
    """
    x = torch.randn(draws, d, generator=torch.Generator().manual_seed(0))
    largest = (x[:, :n].abs().max(1).values / x.norm(dim=1)).tolist()
    return sum(largest) / draws, max(largest)


def similarity(W0: Tensor, W1: Tensor, k: int = K) -> pd.DataFrame:
    """Absolute cosines of the k leading left vectors: rows pretrained, columns tuned, numbered from 1 (figure 3 of the paper)."""
    import pandas as pd

    _check(W0, W1)
    old, new = (first(full(W.float()), min(k, *W.shape)).U for W in (W0, W1))
    numbers = range(1, old.shape[1] + 1)
    return pd.DataFrame((old.T @ new).abs().cpu().numpy(), index=numbers, columns=numbers)
