"""A change of low rank: find it, and update a decomposition by it without touching the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analysis.decompose import EXTRA, Svd, orthonormal, random, ritz
from analysis.gram import blas_threads, thin

MORE = 4  # vectors beside the wanted ones that Lanczos iteration finds


def low_rank(D: Tensor, enough: float) -> Svd | None:
    """The decomposition of a matrix D (out, in) of low rank, by a randomised range finder; None where D is none.

    enough: the Frobenius norm of what may be left out. Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
    """
    for size in (16, 96):
        if 3 * size > min(D.shape):
            return None
        if _exceeds(D, size, enough):
            continue
        Q = orthonormal(thin(D, thin(D.T, orthonormal(thin(D, random(D, size))))))
        R = thin(D.T, Q)
        if float((D - Q @ R.T).norm()) <= enough:
            S, C = ritz(R.double(), size)
            C = C[:, enough / size < S]
            S = S[: C.shape[1]]
            return Svd(Q.double() @ C, S, R.double() @ C / S, solver="sketch")
    return None


def _exceeds(D: Tensor, size: int, enough: float) -> bool:
    """Whether a small part of D proves that more than `size` values are needed: its own are no larger than those of D."""
    rows, columns = (n // (3 * size // 2) for n in D.shape)
    part = D[:: max(rows, 1), :: max(columns, 1)][: 3 * size // 2, : 3 * size // 2]
    return float(torch.linalg.svdvals(part)[size:].norm()) > 2 * enough


def guess(base: Svd, change: Svd | None, k: int) -> tuple[Tensor, bool]:
    """A start (min(out, in), b) for `top`, and whether it is `near`.

    Where the change is known: the vectors of the base's decomposition updated by it. In the coordinates of the base,
    W0 + change is a diagonal plus r columns (Brand 2006), so that a product with it costs O(n r) instead of O(n^2).
    Else the leading base vectors and random ones.
    """
    if len(base.U) < len(base.V):
        return guess(base.flip(), change and change.flip(), k)
    if change is not None and base.V.shape[1] >= 8 * (k + MORE):
        S, A, B = (t.cpu().numpy() for t in _coordinates(base, change))
        with blas_threads(1):  # a few columns: nothing to share
            C = _updated(S, A, B, k)
        if C is not None:
            return thin(base.V, torch.from_numpy(C).to(base.V)), True
    return torch.cat([base.V[:, : k + EXTRA - MORE].double(), random(base.V.T.double(), MORE)], 1), False


def _coordinates(base: Svd, change: Svd) -> tuple[Tensor, Tensor, Tensor]:
    """S (n), A (n or n + r, r) and B (n, r) with U^T W1 V = diag(S) + A B^T; r more rows where U is not square."""
    A = thin(base.U.T, change.U.to(base.U.dtype)).double()
    B = thin(base.V.T, change.V.to(base.V.dtype)).double() * change.S
    if len(base.U) > len(base.V):  # what of the change leaves the column space, up to a rotation
        rest = torch.eye(A.shape[1], dtype=A.dtype, device=A.device) * (1 + 1e-6) - A.T @ A
        A = torch.cat([A, torch.linalg.cholesky_ex(rest)[0].T])
    return base.S.double(), A, B


def _updated(S: Any, A: Any, B: Any, k: int) -> Any:
    """(n, k + MORE) right singular vectors of diag(S) + A B^T by Lanczos iteration (ARPACK); None where it missed one."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = len(S)

    def product(x: Any) -> Any:
        y = A @ (B.T @ x)
        y[:n] += S * x
        return S * y[:n] + B @ (A.T @ y)

    # a start that holds every wanted vector: the leading coordinates, the change, and a little of all
    start = np.exp(-np.arange(n) / k) + B.sum(1) / max(np.abs(B).max(), 1e-300) + 0.1
    square = LinearOperator((n, n), matvec=product, dtype=np.float64)
    values, vectors = eigsh(square, k=k + MORE, which="LA", tol=1e-8, v0=start)
    values = values[::-1]
    cut = k + int(np.argmax(values[k - 1 : -1] - values[k:]))  # the widest gap behind the wanted ones
    complete = _larger(S, A, B, (values[cut - 1] + values[cut]) / 2) == cut
    return vectors[:, ::-1].copy() if complete else None


def _larger(S: Any, A: Any, B: Any, limit: float) -> int:
    """How many squared singular values of diag(S) + A B^T exceed `limit`, without computing them.

    Its Gram matrix is diag(S^2) + X K X^T with X = [S A, B] and K = [[0, I], [I, A^T A]]; Haynsworth's inertia theorem
    then counts in a matrix of 2 r rows. A start of single vectors can miss copies of an equal value: this cannot.
    """
    import numpy as np

    n, r = B.shape
    X = np.concatenate([S[:, None] * A[:n], B], 1)
    inverse = np.block([[-A.T @ A, np.eye(r)], [np.eye(r), np.zeros((r, r))]])  # of K
    small = -inverse - X.T @ (X / (S**2 - limit)[:, None])
    return int((limit < S**2).sum() + (np.linalg.eigvalsh(small) > 0).sum() - r)
