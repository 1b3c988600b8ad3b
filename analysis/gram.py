"""The Gram matrix of a weight, by the symmetric routines of BLAS and LAPACK, which do half of the work of the general ones."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ERROR = 16.0  # times eps ||W^T W||_F: bound of its eigenvalues' error, twice the most that was seen; what can be proven grows with n


def thin(W: Tensor, X: Tensor) -> Tensor:
    """W X for X of a few columns: as rows of X^T they are up to ten times faster, whatever the layout of W."""
    return (X.T.contiguous() @ W.T).T


def blas_threads(count: int) -> Any:
    """A context in which numpy and scipy use `count` threads: their own pool does not hear of torch's number.

    Where other processes work too, its waiting threads turn a millisecond into a hundred.
    """
    return _pools().limit(limits=count)


@lru_cache
def _pools() -> Any:
    import scipy.linalg  # noqa: F401  (a pool is seen once its library is loaded)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


class Gram:
    """W^T W of W (m, n); `values` (n, n), on a CPU in the dtype of W and its lower triangle alone.

    On a GPU in float64, which costs little there, since products in float32 may be those of TF32.
    """

    def __init__(self, W: Tensor):
        self.cpu = W.device.type == "cpu"
        self.dtype = W.dtype if self.cpu else torch.float64
        if not self.cpu:
            self.values = W.double().T @ W.double()
            return
        columns = W.stride(0) == 1  # of W lie together, as LAPACK has it: else it sees the transpose
        a = W.detach().numpy() if columns else W.detach().numpy().T
        self.values = self._call("syrk", 1.0, a, trans=int(columns), lower=1)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        """A routine of scipy's BLAS or LAPACK for this dtype, in torch's number of threads."""
        from scipy.linalg import blas, lapack

        routine = ("s" if self.dtype == torch.float32 else "d") + name
        with blas_threads(torch.get_num_threads()):
            return getattr(blas if hasattr(blas, routine) else lapack, routine)(*args, **options)

    def __matmul__(self, X: Tensor) -> Tensor:
        """W^T W X for X (n, b)."""
        if not self.cpu:
            return self.values @ X
        return torch.from_numpy(self._call("symm", 1.0, self.values, X.numpy(), lower=1))

    def error(self, squares: Tensor) -> float:
        """How exact its eigenvalues are, in absolute terms, where they are about `squares` (the leading ones at least)."""
        return ERROR * torch.finfo(self.dtype).eps * float(squares.double().norm())

    def complete(self, S: Tensor, V: Tensor) -> bool:
        """Whether S (k) and V (n, k) miss no singular value of W that is larger than 1.001 times the smallest of them.

        A Cholesky factor of limit - (W^T W - V S^2 V^T) exists only where all others lie below the limit (Sylvester's inertia).
        """
        limit = 1.002 * float(S[-1]) ** 2 + 2 * self.error(S**2)
        scaled = (V * S).to(self.dtype)
        if not self.cpu:
            rest = scaled @ scaled.T - self.values
            rest.diagonal().add_(limit)
            return int(torch.linalg.cholesky_ex(rest)[1]) == 0
        rest = self._call("syrk", 1.0, scaled.numpy(), beta=-1.0, c=self.values, lower=1)
        rest[range(len(rest)), range(len(rest))] += limit
        return self._call("potrf", rest, lower=1, overwrite_a=1, clean=0)[1] == 0

    def eigen(self, k: int) -> tuple[Tensor, Tensor]:
        """All eigenvalues, falling, and the vectors (n, k) of the k largest."""
        if not self.cpu:
            found, V = torch.linalg.eigh(self.values)
            return found.flip(0), V[:, -k:].flip(1)
        found, V = self._tridiagonal(k)
        return torch.from_numpy(found).flip(0), torch.from_numpy(V).flip(1)

    def _tridiagonal(self, k: int) -> tuple[Any, Any]:
        """Rising: all values of the tridiagonal form by QR iteration, k of its vectors by MRRR in float64, turned back."""
        import numpy as np
        from scipy.linalg.lapack import dstemr

        n = len(self.values)
        A, d, e, tau, _ = self._call("sytrd", self.values, lower=1, lwork=64 * n)
        found, failed = self._call("sterf", d, e)
        _, _, Z, wrong = dstemr(d, np.append(e, 0), 2, 0, 1, n - k + 1, n)
        if failed or wrong:
            raise ArithmeticError(f"LAPACK found no eigenvalues of a matrix of {n} columns (codes {failed}, {wrong})")
        V = Z[:, :k].astype(A.dtype)
        V[1:] = self._call("ormqr", "L", "N", A[1:, :-1], tau, V[1:], 64 * n)[0]
        return found, V
