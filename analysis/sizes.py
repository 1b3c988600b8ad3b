"""Rank or size? Intruders with the change of every matrix scaled to one size, so that runs differ in its shape alone.

A recipe that holds alpha * lr changes the size of the update together with its rank; a spike below the largest pretrained
singular value is no intruder at any rank. Scaling is an analysis of saved states: nothing is trained or scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.spectra import EPSILON, K, compare, intruders, leading

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from bench.config import Config
    from bench.prepare import Prepared
    from bench.record import Record

SIZES = (0.05, 0.1, 0.2)


def at_size(W0: Tensor, W1: Tensor, size: float) -> Tensor:
    """W0 + c (W1 - W0), float32, with c such that the change has `size` times the Frobenius norm of W0; W0 without a change.

    Raises ValueError for a size that is not positive.
    """
    if size <= 0:
        raise ValueError(f"size={size}: the relative size of a change is positive, such as 0.1")
    W0 = W0.float()
    D = W1.float() - W0
    norm = float(D.norm())
    return W0 + D * (size * float(W0.norm()) / norm) if norm else W0


def sized(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    architecture: str | None,
    sizes: Sequence[float] = SIZES,
    *,
    k: int = K,
    folder: Path | None = None,
) -> pd.DataFrame:
    """One row per size and changed matrix: `size`, `name`, `layer`, `kind`, and `cos_left` and `cos_right` of `compare`.

    before, after, architecture, folder: as for `analysis.spectra_model.spectra`.
    """
    import pandas as pd

    from analysis.spectra_model import pieces

    rows = []
    for piece in pieces(before, after, architecture):
        W0, W1 = piece.before, piece.after
        for size in sizes if not W0.equal(W1) else ():
            base, tuned, _ = leading(W0.float(), at_size(W0, W1, size), min(k, *W0.shape), folder)
            found = compare(base, tuned)
            rows.append({"size": size} | piece.where | {side: found[side] for side in ("cos_left", "cos_right")})
    return pd.DataFrame(rows)


def counts(table: pd.DataFrame, k: int = K, epsilon: float = EPSILON) -> pd.DataFrame:
    """Per size: `intruders` over all matrices and the `share` of the changed matrices with one."""
    each = table.assign(count=[intruders(c, k, epsilon) for c in table["cos_left"]])
    return each.groupby("size")["count"].agg(intruders="sum", share=lambda c: (c > 0).mean()).reset_index()


def of_records(
    folder: Path, sizes: Sequence[float], root: str | None = None, device: str = "cpu", k: int = K
) -> tuple[str, pd.DataFrame]:
    """A line for each ok run below `folder`, `sizes.parquet` beside its record, and all counts in one table.

    The table has the columns of `counts` with `run`, `method`, `model`, `task` and `seed`.
    """
    import pandas as pd
    import torch

    from analysis.spectra_runs import NO_CHANGE, each, sides, store, write

    tables: list[pd.DataFrame] = []

    def body(path: Path, record: Record, config: Config, ready: Prepared) -> str:
        with torch.no_grad():
            table = sized(*sides(ready.model, config), sizes, k=k, folder=store())
        if table.empty:
            return NO_CHANGE
        write(table, path / "sizes.parquet")
        about: dict[str, Any] = {"run": record.id, "method": record.method, "model": record.model}
        found = counts(table, k).assign(**about, task=record.task, seed=record.seed)
        tables.append(found)
        return ", ".join(f"{n} at size {s:g}" for s, n in zip(found["size"], found["intruders"], strict=True))

    said = each(folder, body, root, device)
    return said, pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
