"""Birth and rotation of singular vectors during training: the leading ones of every matrix, every so many steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from analysis.spectra import EPSILON, K, compare, intruders, leading

if TYPE_CHECKING:
    import pandas as pd

    from bench.config import Config


class Dynamics:
    """Looks at a model in training and writes `dynamics.parquet` into its folder; moves no random state.

    One row per step and matrix. Lists of k: `sigma` singular values, `cos_left` and `index_left` as in `spectra`, `turn` the
    largest absolute cosine of each left vector with those of the look before, `was` with which of them. A resumed run has no
    look before its first one: `turn` and `was` are empty there.
    """

    def __init__(self, config: Config, folder: Path, k: int = K):
        self.config, self.path, self.k = config, folder / "dynamics.parquet", k
        self.vectors: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether to look after this optimizer step."""
        return bool(self.config.spectra_every) and step % (self.config.spectra_every or 1) == 0

    @torch.no_grad()
    def look(self, model: nn.Module, step: int) -> dict[str, float | None]:
        """Write the rows of this step; return `spectra/intruders` and `spectra/changed` for the history."""
        import pandas as pd

        from analysis.spectra_runs import write

        table = pd.DataFrame(self._rows(model, step))
        changed = int(table["changed"].sum())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = [pd.read_parquet(self.path).query("step < @step")] if self.path.exists() else []
        write(pd.concat([*old, table], ignore_index=True), self.path)
        count = sum(intruders(c) for c in table["cos_left"])
        return {"spectra/intruders": count if changed else None, "spectra/changed": changed}

    def _rows(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        from analysis.spectra_model import pieces
        from analysis.spectra_runs import sides, store

        rows = []
        for piece in pieces(*sides(model, self.config)):
            base, tuned, _ = leading(piece.before, piece.after, min(self.k, *piece.after.shape), store())
            found = {k: v for k, v in compare(base, tuned).items() if k in ("cos_left", "index_left")}
            where = {"step": step} | piece.where | {"changed": not torch.equal(piece.before, piece.after)}
            rows.append(where | {"sigma": tuned.S.tolist()} | found | self._turned(where["name"], tuned.U))
        return rows

    def _turned(self, name: str, U: Tensor) -> dict[str, Any]:
        last, self.vectors[name] = self.vectors.get(name), U.float().cpu()
        if last is None:
            return {"turn": [], "was": []}
        largest, index = (last.T @ self.vectors[name]).abs().max(0)
        return {"turn": largest.clamp_max(1).tolist(), "was": index.tolist()}


def births(table: pd.DataFrame, k: int = K, epsilon: float = EPSILON) -> pd.DataFrame:
    """Per step of `dynamics.parquet`: `intruders` over all matrices, `share` of matrices with one, `born` since the step before."""
    counts = table.assign(count=[intruders(c, k, epsilon) for c in table["cos_left"]])
    found = counts.groupby("step")["count"].agg(intruders="sum", share=lambda c: (c > 0).mean()).reset_index()
    return found.assign(born=found["intruders"].diff().fillna(found["intruders"]).astype(int))


def track(table: pd.DataFrame, name: str, epsilon: float = EPSILON) -> pd.DataFrame:
    """The life of the top intruder that the matrix `name` ends with, followed back from look to look.

    `step`, `rank` (1: largest singular value), `sigma`, `cosine` with its nearest pretrained vector, `turn`: its cosine with
    itself at the look before. Raises ValueError for an unknown matrix, or one that ends without an intruder.
    """
    import pandas as pd

    looks = table[table["name"] == name].sort_values("step", ascending=False)
    if looks.empty:
        raise ValueError(f"no matrix {name!r}; there are {', '.join(table['name'].unique()[:5])}, ...")
    foreign = [i for i, c in enumerate(looks.iloc[0]["cos_left"]) if c < epsilon]
    if not foreign:
        raise ValueError(f"{name} ends without an intruder at epsilon {epsilon}")
    rows: list[Mapping[str, Any]] = []
    at = foreign[0]
    for _, look in looks.iterrows():
        turned = look["turn"][at] if len(look["turn"]) else float("nan")
        here = {"step": look["step"], "rank": at + 1, "sigma": look["sigma"][at], "cosine": look["cos_left"][at]}
        rows.append(here | {"turn": turned})
        if not len(look["was"]):
            break
        at = look["was"][at]
    return pd.DataFrame(rows[::-1])
