"""`python -m analysis recommend`: which method under a budget, on what evidence, and where the data cannot decide.

Within the limits the best mean is the leader. Every other method that fits is tested against it; those that cannot be told
apart are as good as the leader *as far as these data know*, and the one with the fewest trained parameters is chosen.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd

from analysis import paired, power
from analysis.columns import write
from analysis.compare import prepared
from analysis.fronts import Mixed, refuse_mixed
from analysis.ranks import holm
from analysis.text import align

ALPHA = 0.05
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def amount(text: str) -> tuple[float, bool]:
    """`16GB` -> (16e9, False); `500k` -> (5e5, False); `1%` -> (0.01, True). Raises ValueError with the units."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(%|[A-Za-z]*)\s*", text)
    if not found or (found[2] != "%" and found[2] not in _UNITS):
        raise ValueError(
            f"{text!r} is no amount: a number and one of %, {', '.join(u for u in _UNITS if u)}; e.g. 16GB, 1%"
        )
    value = float(found[1])
    return (value / 100, True) if found[2] == "%" else (value * _UNITS[found[2]], False)


def candidates(runs: pd.DataFrame, max_memory: str | None, max_params: str | None) -> pd.DataFrame:
    """One row per method of one task and model: score, seeds, costs, and `misses`, why it does not fit ("" where it does).

    A method fits where every seed does (`memory_peak` in bytes; `trained_params` as a number or a share of `total_params`).
    A cost that was not measured does not fit.
    """
    table = runs.groupby("method", sort=False).agg(
        score=("score", "mean"), seeds=("seed", "nunique"), memory_peak=("memory_peak", "max"),
        trained_params=("trained_params", "max"), total_params=("total_params", "max"),
    )  # fmt: skip
    misses = [_misses(row, max_memory, max_params) for row in table.to_dict("records")]
    return table.assign(misses=misses).sort_values("score", ascending=False)


def _misses(row: dict[Any, Any], max_memory: str | None, max_params: str | None) -> str:
    why = []
    if max_memory is not None:
        limit, share = amount(max_memory)
        if share:
            raise ValueError(f"--max-memory {max_memory}: give bytes, e.g. 16GB")
        why += [] if row["memory_peak"] <= limit else [f"memory {write(row['memory_peak'], 'bytes')}"]
    if max_params is not None:
        limit, share = amount(max_params)
        limit *= row["total_params"] if share else 1
        why += [] if row["trained_params"] <= limit else [f"trains {write(row['trained_params'])}"]
    return ", ".join(why)


def against_leader(runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The methods that fit, each with the leader's lead: difference, p, p_holm, `evidence` and `apart`.

    evidence: "predictions" (paired bootstrap over seeds and rows), "seeds" (Welch's t), "rows" (unpaired, from the size of the
    test set and the accuracy), or "none": one run each, nothing known about noise.
    """
    fits = table[table["misses"] == ""]
    leader = fits.index[0]
    found = [_test(runs, leader, other) for other in fits.index[1:]]
    rows = pd.DataFrame(found, index=fits.index[1:], columns=["difference", "p", "evidence"])
    known = rows["p"].astype(float).notna().to_numpy()
    adjusted = np.full(len(rows), np.nan)
    adjusted[known] = holm(rows["p"].to_numpy(float)[known])
    out = fits.join(rows.assign(p_holm=adjusted))
    return out.assign(apart=out["p_holm"] < ALPHA)


def _test(runs: pd.DataFrame, leader: str, other: str) -> tuple[float, float, str]:
    a, b = (runs.loc[runs["method"] == m, "score"].to_numpy(float) for m in (leader, other))
    gap = float(a.mean() - b.mean())
    try:
        row = paired.compare(runs, leader, other, draws=4_000).iloc[0]
        return float(row["difference"]), float(row["p_bootstrap"]), "predictions"
    except Mixed:
        raise
    except (FileNotFoundError, ValueError):
        pass  # no predictions, no common seed, or a metric that is no function of them: the next best evidence
    if min(len(a), len(b)) > 1:
        from scipy.stats import ttest_ind

        return gap, float(ttest_ind(a, b, equal_var=False).pvalue), "seeds"
    rows = pd.to_numeric(runs["data_rows_test"], errors="coerce").max() if "data_rows_test" in runs else math.nan
    if rows > 0 and set(runs["metric"]) <= {"accuracy", "exact_match"}:
        return gap, power.unpaired(a.mean(), b.mean(), int(rows))["p"], "rows"
    return gap, math.nan, "none"


def recommend(
    runs: pd.DataFrame, max_memory: str | None = None, max_params: str | None = None, task: str | None = None
) -> str:
    """The recommendation as text, one part per task and model."""
    runs, notes = prepared(runs, task=task)
    if runs.empty:
        raise ValueError("no run has status ok and a score: nothing can be recommended")
    parts, equal = [notes] if notes else [], []
    for (name, model), part in runs.groupby(["task", "model"], sort=False):
        refuse_mixed(part, "memory" if max_memory else "", strict=True)
        text, as_good = _part(part, f"{name}, {model}", max_memory, max_params)
        parts.append(text)
        equal.append(as_good)
    if len(equal) > 1:
        always = sorted(set.intersection(*equal))
        parts.append(f"among the best on all {len(equal)} tasks: {', '.join(always) or 'no method'}")
    if runs["data_standin"].any():
        parts.append("(stand-in): generated rows that only show that everything runs; no result about a method")
    return "\n\n".join(parts)


def _part(part: pd.DataFrame, title: str, max_memory: str | None, max_params: str | None) -> tuple[str, set[str]]:
    table = candidates(part, max_memory, max_params)
    if (table["misses"] != "").all():
        near = ", ".join(f"{m} ({why})" for m, why in table["misses"].head(5).items())
        return f"{title}: no method fits the budget; the best that do not: {near}", set()
    found = against_leader(part, table)
    as_good = found[~found["apart"]]
    choice = as_good["trained_params"].fillna(math.inf).idxmin()
    lines = [["method", "score", "seeds", "trained", "memory", "behind the leader", "p (Holm)", "from"]]
    lines += [_line(str(m), row, m == choice) for m, row in found.iterrows()]
    out = table[table["misses"] != ""]
    text = [f"{title}: {_verdict(found, as_good, str(choice))}", *align(lines)]
    if "rows" in set(found["evidence"]):
        text.append(
            "from rows: the size of the test set alone, unpaired; another seed or software moves scores as well"
        )
    if len(out):
        text.append("over budget: " + ", ".join(f"{m} ({why})" for m, why in out["misses"].items()))
    return "\n".join(text), set(as_good.index)


def _verdict(found: pd.DataFrame, as_good: pd.DataFrame, choice: str) -> str:
    leader = str(found.index[0])
    if len(found) == 1:
        return f"{leader}, the only method that fits"
    if (found["evidence"][1:] == "none").all():
        return (
            f"the data cannot decide: one seed each and no stored predictions. Highest number: {leader}; "
            "run more seeds (seed=0,1,2,3,4)"
        )
    if len(as_good) == 1:
        return f"{leader}, better than each of the {len(found) - 1} others that fit"
    others = ", ".join(str(m) for m in as_good.index if m != choice)
    if len(as_good) == len(found):
        return (
            f"the data cannot decide between the {len(found)} methods that fit; {choice} trains the fewest parameters"
        )
    return f"{choice}, which trains the fewest parameters of {len(as_good)} that cannot be told apart (with {others})"


def _line(name: str, row: pd.Series, chosen: bool) -> list[str]:
    costs = [write(row["trained_params"]), write(row["memory_peak"], "bytes")]
    first = pd.isna(row["difference"])
    gap = "leader" if first else f"{row['difference']:.4f}"
    p = "" if first else "–" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.3g}"
    facts = [f"{row['score']:.4f}", str(row["seeds"]), *costs, gap, p, "" if first else str(row["evidence"])]
    return [f"{name} *" if chosen else name, *facts]
