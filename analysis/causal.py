"""Are intruders the cause? Scale one singular vector of each tuned matrix and look at the task and at forgetting.

Shuttleworth et al. 2024, https://arxiv.org/abs/2410.21228, section 5: W_l = W + (l - 1) s u v^T for the top intruder (u, s, v)
of each matrix; l = 1 is the model, l = 0 is without it. The control scales a neighbouring vector that is no intruder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from analysis.spectra import EPSILON, K, compare, leading
from methods.base import Unsupported
from tasks.data import MissingData

if TYPE_CHECKING:
    import pandas as pd

    from bench.config import Config
    from bench.prepare import Prepared
    from bench.record import Record

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.5, 2.0)
WHICH = ("top", "all")


@dataclass
class Cut:
    """Vectors of one matrix `weight[rows]` that are scaled together: `left` (out, n) holds s u, `right` (in, n) v."""

    name: str
    weight: Tensor
    rows: slice
    left: Tensor
    right: Tensor
    indices: list[int]


def chosen(cosines: Sequence[float], which: str = "top", epsilon: float = EPSILON) -> tuple[list[int], list[int]]:
    """Indices of the intruders that are scaled, and of as many neighbours that are none, nearest first.

    which: the one with the largest singular value, as in the paper, or all. Where a matrix has too few vectors that are
    no intruders, there are fewer neighbours.
    """
    if which not in WHICH:
        raise ValueError(f"which={which!r}: the options are {', '.join(WHICH)}")
    found = [i for i, c in enumerate(cosines) if c < epsilon][: 1 if which == "top" else None]
    free = [i for i, c in enumerate(cosines) if c >= epsilon]
    control: list[int] = []
    for i in found:
        near = sorted(set(free) - set(control), key=lambda j: (abs(j - i), j))
        control += near[:1]
    return found, control


def cuts(model: nn.Module, config: Config, which: str = "top", k: int = K) -> dict[str, list[Cut]]:
    """What is scaled, `intruder` and `neighbour`, in the merged `model`, whose weights are compared with the pretrained ones.

    Raises Unsupported where no matrix has an intruder.
    """
    from analysis.spectra_model import align, pieces
    from analysis.spectra_runs import sides, store
    from bench.model import acting

    before, after, architecture = sides(model, config)
    layers: Any = align(before, acting(model))  # type: ignore[arg-type]
    found: dict[str, list[Cut]] = {"intruder": [], "neighbour": []}
    for piece in pieces(before, after, architecture):
        base, tuned, _ = leading(piece.before, piece.after, min(k, *piece.after.shape), store())
        for kind, indices in zip(found, chosen(compare(base, tuned)["cos_left"], which), strict=True):
            if indices:
                left, right = tuned.U[:, indices] * tuned.S[indices], tuned.V[:, indices].to(tuned.U)
                weight = layers[piece.name].weight
                found[kind].append(Cut(piece.where["name"], weight, piece.rows, left, right, indices))
    if not found["intruder"]:
        raise Unsupported(f"no matrix has an intruder among its {k} leading vectors: nothing to scale")
    return found


@contextmanager
def scaled(what: Sequence[Cut], factor: float) -> Iterator[None]:
    """The planes of `what` times `factor` inside the block; the very weights of before on leaving."""
    kept = [cut.weight[cut.rows].detach().clone() for cut in what]
    with torch.no_grad():
        for cut, W in zip(what, kept, strict=True):
            cut.weight[cut.rows] = W + ((factor - 1) * cut.left @ cut.right.T).to(W)
    try:
        yield
    finally:
        with torch.no_grad():
            for cut, W in zip(what, kept, strict=True):
                cut.weight[cut.rows] = W


def sweep(
    ready: Prepared,
    config: Config,
    lambdas: Sequence[float] = LAMBDAS,
    *,
    which: str = "top",
    split: str = "val",
    k: int = K,
) -> pd.DataFrame:
    """One row per scaled vector (`intruder`, `neighbour`) and lambda: `score` on `split`, `forgetting`, `matrices`.

    The model is merged. `forgetting` is NaN where it cannot be measured, for which `attrs["reason"]` says why. The test
    split is for a lambda that val has chosen, not for choosing one. Raises Unsupported without intruders, ValueError for the
    test split of a run that keeps it locked.
    """
    import pandas as pd

    from analysis.forgetting import yardstick
    from analysis.weights import built
    from bench.model import merge

    if split == "test" and config.test != "open":
        raise ValueError(f"the test split of this run is {config.test}: sweep on val")
    merge(ready.model)
    found = cuts(ready.model, config, which, k)
    stick, before, reason = None, float("nan"), ""
    try:
        stick = yardstick(ready.model, config)
        before = stick.value(built(config).model.to(next(ready.model.parameters())))
    except (Unsupported, MissingData) as error:
        reason = str(error)
    rows = []
    for kind, what in found.items():
        for factor in lambdas:
            with scaled(what, factor):
                score = ready.task.score(ready.predict(split, config))[ready.task.metric]
                lost = stick.lost(before, stick.value(ready.model)) if stick else float("nan")
            rows.append({"vector": kind, "lambda": factor, "score": score, "forgetting": lost, "matrices": len(what)})
    table = pd.DataFrame(rows)
    table.attrs = {"metric": ready.task.metric, "split": split, "reason": reason}
    return table.assign(split=split, which=which, measure=stick.measure if stick else None)


def of_records(
    folder: Path, lambdas: Sequence[float], root: str | None = None, device: str = "cpu", **choices: Any
) -> str:
    """Sweep each ok run below `folder`: a table for each, and `causal.parquet` beside its record.

    choices: `which`, `split`, `k` of `sweep`.
    """
    from analysis.spectra_runs import each, write

    def body(path: Path, record: Record, config: Config, ready: Prepared) -> str:
        table = sweep(ready, config, lambdas, **choices)
        table = table.assign(run=record.id, task=record.task)
        write(table, path / "causal.parquet")
        return text(table)

    return each(folder, body, root, device)


def changes(table: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """`change` of `value` against lambda = 1: `mean`, `low` and `high` over runs, per vector and lambda.

    table: one of `sweep`, or several joined with a column `run`. Raises ValueError where lambda = 1 was not measured.
    """
    groups = _against_own(table, value).groupby(["vector", "lambda"])["change"]
    return groups.agg(mean="mean", low="min", high="max", n="size").reset_index()


def _against_own(table: pd.DataFrame, value: str) -> pd.DataFrame:
    table = (table if "run" in table else table.assign(run="")).dropna(subset=value)
    own = table.loc[table["lambda"] == 1, ["run", "vector", value]].rename(columns={value: "own"})
    if len(table) and own.empty:
        raise ValueError("lambda = 1, the model itself, is not among the measured ones: add 1 to --lambdas")
    found = table.merge(own, on=["run", "vector"])
    return found.assign(change=found[value] - found["own"])


def effects(table: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """Mean change of `value` against lambda = 1 over runs, a row per lambda: `intruder`, `neighbour`, and their `difference`.

    `x ±` is half of the 95 % t interval (NaN with one run); that of the difference is over the runs' own differences. table:
    several of `sweep`, joined with a column `run`.
    """
    import numpy as np
    from scipy.special import stdtrit

    wide = _against_own(table, value).pivot(index=["lambda", "run"], columns="vector", values="change")
    groups = wide.assign(difference=wide["intruder"] - wide["neighbour"]).groupby("lambda")
    n = groups.count()
    half = stdtrit(n - 1, 0.975) * groups.std() / np.sqrt(n)
    return groups.mean().join(half.add_suffix(" ±")).reset_index()


def effects_text(table: pd.DataFrame) -> str:
    """`effects` on the score and on forgetting as a Markdown table."""
    names = ("intruder", "neighbour", "difference")
    values = [v for v in ("score", "forgetting") if table[v].notna().any()]
    lines = [f"change against lambda = 1, mean of {table['run'].nunique()} runs ± half of the 95 % t interval"]
    lines.append(f"| lambda | {' | '.join(f'{v}: {n}' for v in values for n in names)} |")
    lines.append("| --- " * (1 + len(values) * len(names)) + "|")
    found = [effects(table, v).set_index("lambda") for v in values]
    for factor in found[0].index:
        cells = [f"{t.loc[factor, n]:+.3f} ± {t.loc[factor, f'{n} ±']:.3f}" for t in found for n in names]
        lines.append(f"| {factor:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def text(table: pd.DataFrame) -> str:
    """Score and forgetting per lambda, intruder beside neighbour."""
    about = table.attrs
    lines = [f"{about['metric']} on {about['split']}, {table['matrices'].iloc[0]} matrices with an intruder"]
    wide = table.pivot(index="lambda", columns="vector", values=["score", "forgetting"])
    wide.columns = wide.columns.map(" ".join)
    lines.append(wide.dropna(axis=1, how="all").to_string(float_format=lambda x: f"{x:.4f}"))
    return "\n".join([*lines, f"forgetting not measured: {about['reason']}"] if about["reason"] else lines)
