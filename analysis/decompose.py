"""Singular vectors, exact and fast: a full decomposition kept on disk, a truncated one whose error is checked."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.gram import Gram, thin

EXTRA = 6  # vectors beside the wanted ones
DEPTH = 6  # products with the Gram matrix between two Rayleigh-Ritz steps
ROUNDS = 12
TOLERANCE = 5e-5  # bound of the angle between a returned and the exact vector, so of the error of a cosine


class Svd(NamedTuple):
    """W = U diag(S) V^T: U (out, n), S (n,) falling, V (in, n); `error` bounds the angle to the exact vectors."""

    U: Tensor
    S: Tensor
    V: Tensor
    error: float = 0.0
    solver: str = "full"

    def flip(self) -> Svd:
        """That of the transposed matrix."""
        return self._replace(U=self.V, V=self.U)


def full(W: Tensor) -> Svd:
    """The decomposition of W (out, in) in float64, all min(out, in) vectors."""
    if W.shape[0] < W.shape[1]:  # LAPACK is about twice as fast on the tall side
        return full(W.T).flip()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return Svd(U, S, Vh.T)


def cached(W: Tensor, folder: Path) -> Svd:
    """`full(W)`, U and V as float32, from `folder` where it was computed before, by any process.

    The name is the hash of dtype, shape and content, so that neither a moved branch of a model nor an equal name of another
    one can hit a wrong file, and equal matrices of different runs share theirs. A file appears whole or not at all.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    W = W.detach().contiguous()
    digest = hashlib.sha256(f"{W.dtype} {tuple(W.shape)} ".encode())
    content: Any = W.cpu().view(torch.uint8).numpy()
    digest.update(content)
    path = folder / digest.hexdigest()[:2] / f"{digest.hexdigest()[:32]}.safetensors"
    try:
        found = load_file(str(path), device=str(W.device))
        return Svd(found["U"], found["S"], found["V"])
    except (FileNotFoundError, SafetensorError):  # the latter: a file that the disk has cut
        base = full(W)
    base = Svd(base.U.float().contiguous(), base.S, base.V.float().contiguous())  # as a file gives it
    _write(path, {"U": base.U, "S": base.S, "V": base.V})
    return base


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    os.close(handle)
    try:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, part)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def top(W: Tensor, k: int, start: Tensor | None = None, near: bool = False) -> Svd:
    """The k leading singular vectors of W (out, in) in float64, from `start` (min(out, in), b), on the short side.

    near: `start` is known to hold no wrong vectors, so that a step of Rayleigh-Ritz and its residual prove it. Otherwise block
    Krylov iteration, whose residual and a Cholesky factor prove it. Where no proof succeeds: the eigenvectors of its Gram
    matrix in float64. Where their residual is too large as well, and where W is small: `full`.
    """
    if W.shape[0] < W.shape[1]:
        return top(W.T, k, start, near).flip()
    if W.shape[1] < 6 * (k + EXTRA):
        return first(full(W), k)
    D = W.double()
    start = orthonormal(random(D, k + EXTRA) if start is None else start.double())
    found = _ritz(D, start, k, "update") if near else None
    if found is None or found.error > TOLERANCE:
        found = _krylov(D, W.float(), start, k) or _ritz(D, Gram(D).eigen(k + EXTRA)[1], k, "gram")
    return first(full(W) if found is None or found.error > TOLERANCE else found, k)


def first(svd: Svd, k: int) -> Svd:
    """The k leading vectors alone."""
    return svd._replace(U=svd.U[:, :k], S=svd.S[:k], V=svd.V[:, :k])


def _ritz(D: Tensor, V: Tensor, k: int, solver: str) -> Svd | None:
    """The best vectors of D (m, n) within the span of V (n, b), orthonormal; None where the k-th value is rounding."""
    image = thin(D, V)
    S, C = ritz(image, V.shape[1])
    if S[k - 1] <= 1e-7 * S[0]:
        return None  # the square of a value that small is rounding
    V, U = V @ C, image @ C / S.clamp_min(1e-300)
    return Svd(U, S, V, _bound(S, (thin(D.T, U) - V * S).norm(dim=0), k), solver)


def _krylov(D: Tensor, F: Tensor, V: Tensor, k: int) -> Svd | None:
    """Block Krylov iteration from V (n, b): the space grows in float32, values, vectors and residuals are those of D in float64.

    A Cholesky factor proves that no larger value was missed. None where none was found, and where F, which is D in float32,
    is too coarse for the k-th value.
    """
    gram = Gram(F)
    for _ in range(ROUNDS):
        basis, image = _space(gram, orthonormal(V.to(gram.dtype)))
        V = basis @ torch.linalg.eigh(basis.T @ image)[1][:, -V.shape[1] :].flip(1)
        found = _ritz(D, orthonormal(V.double()), k, "krylov")
        if found is None or found.S[k - 1] < 0.01 * found.S[0]:
            return None
        if found.error <= TOLERANCE:
            return first(found, k) if gram.complete(found.S[:k], found.V[:, :k]) else None
        V = found.V
    return None


def ritz(image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading singular values and right vectors (columns) of `image`."""
    squares, C = torch.linalg.eigh(image.T @ image)
    return squares.clamp_min(0).sqrt().flip(0)[:count], C.flip(1)[:, :count]


def _space(gram: Gram, V: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of V, G V, G^2 V, ..., and G times that basis."""
    basis, image = V, gram @ V
    last = image
    for _ in range(DEPTH - 1):
        new = last
        for _ in range(2):  # once is not enough where V is nearly invariant
            new = orthonormal(new - basis @ (basis.T @ new))
        last = gram @ new
        basis, image = torch.cat([basis, new], 1), torch.cat([image, last], 1)
    return basis, image


def _bound(S: Tensor, residual: Tensor, k: int) -> float:
    """Largest angle of the first k vectors: outside the block to first order, inside it to second.

    Rayleigh-Ritz leaves residuals that are orthogonal to the block, so that only the distance to the values outside of it,
    of which the block's last one is an upper estimate, divides them. A pair of equal values is no error: its plane is right.
    """
    noise = 1e-13 * S[0]
    outside = (S[:k] - S[-1]).clamp_min(noise)
    distance = (S[:k, None] - S[None]).abs()
    distance[range(k), range(k)] = torch.inf
    inside = distance.min(1).values.clamp_min(1e-8 * S[0])
    worst = residual[:k].max()
    return float((residual[:k] / outside + worst**2 / (outside * inside)).max())


def orthonormal(X: Tensor) -> Tensor:
    """A basis of the columns of X (n, b)."""
    return torch.linalg.qr(X)[0]


def random(like: Tensor, columns: int) -> Tensor:
    """(in, columns) normal numbers, always the same ones: a spectrum is a function of its matrices."""
    numbers = torch.randn(like.shape[1], columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers.to(like)
