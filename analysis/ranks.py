"""Methods over tasks: Wilcoxon with Holm, Friedman with Nemenyi, critical differences, win/tie/loss.

Every function takes `scores`, a table with one row per task and one column per method (`by_task` makes it): means over
seeds, larger is better, no gaps. Demšar 2006 is the source of the procedure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.fronts import refuse_mixed
from analysis.paired import one_setting

BLOCK = ("task", "model")
ALPHA = 0.05


def by_task(
    runs: pd.DataFrame, methods: Sequence[str] | None = None, *, value: str = "score", strict: bool = True
) -> pd.DataFrame:
    """(tasks, methods) means over seeds of runs with status ok; tasks that a method lacks are named in attrs["dropped"].

    Raises Mixed where sources, stand-in and real data, software, or within a task protocol or data differ (`strict=False`
    lets software differ with a warning), and where a method has several settings on a task.
    """
    ok = runs[(runs["status"] == "ok") & runs[value].notna()]
    if methods is not None:
        absent = sorted(set(methods) - set(ok["method"]))
        if absent:
            raise ValueError(
                f"no finished runs of {', '.join(absent)}; there are {', '.join(sorted(set(ok['method'])))}"
            )
        ok = ok[ok["method"].isin(methods)]
    refuse_mixed(ok, across=BLOCK, strict=strict)
    one_setting(ok)
    table = ok.groupby([*BLOCK, "method", "seed"])[value].mean().groupby([*BLOCK, "method"]).mean().unstack("method")
    whole = table.dropna()
    order = whole.mean().sort_values(ascending=False).index if methods is None else list(methods)
    whole = whole[order]
    whole.attrs["dropped"] = [" / ".join(map(str, index)) for index in table.index.difference(whole.index)]
    whole.attrs["standin"] = "data_standin" in ok and bool(ok["data_standin"].any())
    return whole


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """(m,) p-values adjusted for m tests (Holm 1979): the i-th smallest times m - i + 1, never falling, at most 1."""
    values = np.asarray(p, float)
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    out = np.empty_like(values)
    out[order] = adjusted
    return out


def wilcoxon(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each method against `reference` over tasks: difference (mean), median, win, tie, loss, p, p_holm.

    Two-sided signed-rank test (`signed_rank`), Holm over the methods of the table.
    """
    if reference not in scores:
        raise ValueError(f"reference {reference!r} is no method of the table: {', '.join(map(str, scores.columns))}")
    rows = []
    for name in scores.columns.drop(reference):
        gap = _gap(scores, name, reference)
        p = signed_rank(gap)
        wins, losses = int((gap > 0).sum()), int((gap < 0).sum())
        counts = {"win": wins, "tie": len(gap) - wins - losses, "loss": losses}
        rows.append({"method": name, "difference": gap.mean(), "median": gap.median()} | counts | {"p": p})
    table = pd.DataFrame(rows)
    return table.assign(tasks=len(scores), p_holm=holm(table["p"].to_numpy()))


def signed_rank(gaps: Sequence[float] | pd.Series) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact with ties as well (scipy approximates there); zeros are dropped.

    The rank sum's distribution over all 2^N signs, by convolution over the mean ranks; equal to scipy's exact one without
    ties.
    """
    values = np.asarray(gaps, float)
    values = values[values != 0]
    if not len(values):
        return 1.0
    _, where, counts = np.unique(np.abs(values), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(counts) - counts + 1)[where]  # mean ranks are halves
    chance = np.zeros(doubled.sum() + 1)
    chance[0] = 1
    for rank in doubled:
        chance[rank:] = (chance[rank:] + chance[:-rank]) / 2
        chance[:rank] /= 2
    positive = int(doubled[values > 0].sum())
    tail = min(chance[: positive + 1].sum(), chance[positive:].sum())
    return float(min(1.0, 2 * tail))


def _gap(scores: pd.DataFrame, a: str, b: str) -> pd.Series:
    """Differences per task, rounded so that what is equal on paper is a tie in floating point as well."""
    return (scores[a] - scores[b]).round(12)


def win_tie_loss(scores: pd.DataFrame, margin: float = 0.0) -> pd.DataFrame:
    """Every ordered pair: method, other, win, tie, loss over tasks; a difference of at most `margin` is a tie."""
    rows = []
    for a in scores.columns:
        for b in scores.columns.drop(a):
            gap = _gap(scores, a, b)
            win, loss = int((gap > margin).sum()), int((gap < -margin).sum())
            rows.append({"method": a, "other": b, "win": win, "tie": len(gap) - win - loss, "loss": loss})
    return pd.DataFrame(rows)


def mean_ranks(scores: pd.DataFrame) -> pd.Series:
    """Mean rank of each method over tasks, 1 is best, ties share the mean; sorted."""
    return scores.round(12).rank(axis=1, ascending=False).mean().sort_values()


def friedman(scores: pd.DataFrame) -> dict[str, float]:
    """`chi2`, `p` (with tie correction), Iman and Davenport's `f`, `p_f`, and `cd`, Nemenyi's critical difference.

    Raises ValueError for fewer than 3 methods or 2 tasks.
    """
    from scipy.special import chdtrc, fdtrc

    n, k = scores.shape
    if k < 3 or n < 2:
        raise ValueError(
            f"Friedman's test needs 3 methods and 2 tasks; here are {k} and {n}: use wilcoxon for 2 methods"
        )
    ranks = scores.round(12).rank(axis=1).to_numpy() - (k + 1) / 2
    spread = (ranks**2).sum()
    chi2 = (k - 1) * (ranks.sum(0) ** 2).sum() / spread if spread else 0.0  # no task ranks anything: no difference
    room = n * (k - 1) - chi2
    f = (n - 1) * chi2 / room if room > 1e-9 else np.inf
    return {
        "tasks": n,
        "methods": k,
        "chi2": float(chi2),
        "p": float(chdtrc(k - 1, chi2)),
        "f": float(f),
        "p_f": float(fdtrc(k - 1, (k - 1) * (n - 1), f)) if room > 1e-9 else 0.0,
        "cd": critical_distance(k, n),
    }


def critical_distance(methods: int, tasks: int, alpha: float = ALPHA) -> float:
    """Nemenyi: q(α, k, ∞) / √2 · √(k (k+1) / (6 N)) mean ranks (Demšar 2006, section 3.2.2)."""
    low, high = 0.0, 40.0
    for _ in range(60):  # halve until the quantile is exact
        middle = (low + high) / 2
        low, high = (middle, high) if range_tail(np.array(middle), methods) > alpha else (low, middle)
    return float(low / np.sqrt(2) * np.sqrt(methods * (methods + 1) / (6 * tasks)))


def range_tail(q: np.ndarray, k: int) -> np.ndarray:
    """P(the range of k independent standard normals > q), of each q: 1 - k ∫ φ(z) (Φ(z) - Φ(z - q))^(k-1) dz.

    scipy's `studentized_range` with infinite degrees gives the same, in seconds instead of milliseconds.
    """
    from scipy.special import ndtr

    z = np.linspace(-9, 9, 361)  # the trapezoid rule is exact to rounding for an integrand this smooth
    inside = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (ndtr(z) - ndtr(z - q[..., None])) ** (k - 1)
    return (1 - k * inside.sum(-1) * (z[1] - z[0])).clip(0, 1)


def nemenyi(scores: pd.DataFrame) -> pd.DataFrame:
    """(methods, methods) p-values of all pairs of mean ranks, 1 on the diagonal; corrected for the number of methods."""
    ranks = mean_ranks(scores)
    n, k = scores.shape
    gap = np.abs(ranks.to_numpy()[:, None] - ranks.to_numpy()) / np.sqrt(k * (k + 1) / (6 * n))
    p = range_tail(gap * np.sqrt(2), k)
    return pd.DataFrame(np.where(np.eye(k, dtype=bool), 1.0, p), ranks.index, ranks.index)


def critical_difference(scores: pd.DataFrame, test: str = "nemenyi", alpha: float = ALPHA) -> pd.DataFrame:
    """The data of a critical-difference diagram: method, mean_rank, and `groups`, the numbers of its bars.

    A bar joins neighbours in rank of whom no pair can be told apart. test: "nemenyi" (mean ranks), or "wilcoxon" (signed
    ranks of every pair, Holm over all pairs; Benavoli 2016 prefers it, as a pair's verdict then depends on the pair only).
    attrs: `cd` (None for wilcoxon), `friedman_p`, `tasks`, `bars` [(first, last), ...] by position.
    """
    if test not in ("nemenyi", "wilcoxon"):
        raise ValueError(f"test={test!r} is none of nemenyi, wilcoxon")
    ranks = mean_ranks(scores)
    p = nemenyi(scores) if test == "nemenyi" else wilcoxon_pairs(scores)
    apart = p.loc[ranks.index, ranks.index].to_numpy() < alpha
    bars = _bars(apart)
    groups = [tuple(i for i, (low, high) in enumerate(bars) if low <= at <= high) for at in range(len(ranks))]
    table = pd.DataFrame({"method": ranks.index, "mean_rank": ranks.to_numpy(), "groups": groups})
    cd = critical_distance(scores.shape[1], len(scores), alpha) if test == "nemenyi" else None
    table.attrs.update(cd=cd, tasks=len(scores), bars=bars, test=test, friedman_p=friedman(scores)["p"])
    table.attrs["standin"] = scores.attrs.get("standin", False)
    return table


def wilcoxon_pairs(scores: pd.DataFrame) -> pd.DataFrame:
    """(methods, methods) p-values of signed ranks over tasks, Holm over all pairs, 1 on the diagonal."""
    names = list(scores.columns)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    columns = {name: scores[name].to_numpy(float) for name in names}
    raw = [signed_rank((columns[a] - columns[b]).round(12)) for a, b in pairs]
    table: Any = pd.DataFrame(1.0, index=names, columns=names)
    for (a, b), p in zip(pairs, holm(raw), strict=True):
        table.loc[a, b] = table.loc[b, a] = p
    return table


def _bars(apart: np.ndarray) -> list[tuple[int, int]]:
    """The longest runs of positions in which no pair is apart; runs of one, and runs inside longer ones, are left out."""
    bars: list[tuple[int, int]] = []
    for first in range(len(apart)):
        last = first
        while last + 1 < len(apart) and not apart[first : last + 2, first : last + 2].any():
            last += 1
        if last > first and not any(low <= first and last <= high for low, high in bars):
            bars.append((first, last))
    return bars
