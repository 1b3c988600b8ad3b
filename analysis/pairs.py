"""Every pair of methods on one task at once: the significance matrix of a report.

`paired.compare` draws 10,000 test sets for one pair; p-values of hundreds of pairs, corrected by Holm, would need millions of
draws. Here the noise of test rows is the infinitesimal jackknife's (Efron 1982; the delta method), which needs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.paired import stored
from analysis.ranks import holm
from analysis.resample import METRICS, Sums, sums

Array = NDArray[np.float64]
COLUMNS = ("first", "second", "difference", "seeds", "evidence", "se", "df")


Problems = list[tuple[str, str]]  # of files: path, what is wrong with it


def all_pairs(rows: Mapping[str, Sequence[Mapping[Any, Any]]], problems: Problems | None = None) -> pd.DataFrame:
    """One row per pair of names, in the units of the score: `COLUMNS`, `p` (two-sided) and `p_holm` over all pairs with a p.

    rows: name -> its finished runs (rows of `analysis.load`, as dicts; one setting) on one task and model; only runs of one
    software and one test set are compared. Predictions that cannot be used are named in `problems`. evidence: "predictions" (noise of the test rows, which are the same for both; with several seeds their
    noise too), "seeds" (no predictions: paired t over common seeds), or why there is no p: "software", "other test rows",
    "one seed", "no common seed".

    se² = Σ over rows of the mean influence of the difference, squared, + sd² / s with the sd of the s differences per seed;
    degrees by Welch and Satterthwaite, the rows' part counting as infinitely many.
    """
    problems = [] if problems is None else problems
    scored = {name: {run["seed"]: _of_run(run, problems) for run in runs} for name, runs in rows.items()}
    names = list(rows)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = [{"first": a, "second": b} | _pair(scored[a], scored[b]) for a, b in pairs]
    return _with_p(pd.DataFrame(found, columns=list(COLUMNS)))


def influence(part: Sums) -> Array:
    """(rows,) what each test row adds to the metric; the sum of its squares is the metric's variance over test sets."""
    total = part.features.sum(0)
    steps = np.diag(1e-4 * np.maximum(np.abs(total), 1.0))
    gradient = (part.value(total + steps) - part.value(total - steps)) / (2 * np.diag(steps))
    return (part.features - part.features.mean(0)) @ np.nan_to_num(gradient)


def _of_run(run: Mapping[Any, Any], problems: Problems) -> dict[str, Any]:
    """The score, the software, and where predictions are stored a name of the test rows and the influence of each."""
    facts = {"score": float(run["score"]), "software": run.get("software"), "rows": None, "influence": None}
    if run["metric"] not in METRICS:  # no function of label and prediction: seeds must do
        return facts
    try:
        columns = stored(run)
        part = sums(run["metric"], columns)
        test = hash((tuple(columns["row_id"].tolist()), tuple(columns["label"].tolist())))
    except FileNotFoundError:
        return facts
    except (ValueError, TypeError, KeyError) as error:
        problems.append((str(Path(run["path"]).with_name("predictions.parquet")), f"{type(error).__name__}: {error}"))
        return facts
    return facts | {"rows": test, "influence": influence(part)}


def _pair(a: dict[Any, dict[str, Any]], b: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    both = [(a[s], b[s]) for s in a if s in b]
    if not both:
        return {"evidence": "no common seed"}
    gaps = [x["score"] - y["score"] for x, y in both]
    mean = sum(gaps) / len(gaps)  # of two to five numbers: numpy takes ten times as long
    about = {"difference": mean, "seeds": len(gaps)}
    if any(x["software"] != y["software"] for x, y in both):
        return about | {"evidence": "software"}
    if any(x["rows"] != y["rows"] for x, y in both if x["rows"] and y["rows"]):
        return about | {"evidence": "other test rows"}
    known = all(x["rows"] and y["rows"] for x, y in both)
    if not known and len(gaps) < 2:
        return about | {"evidence": "one seed"}
    of_rows = _variance_of_rows(both) if known else 0.0
    of_seeds = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps) if len(gaps) > 1 else 0.0
    total = of_rows + of_seeds
    df = (total / of_seeds) ** 2 * (len(gaps) - 1) if of_seeds > 0 else np.inf
    return about | {"evidence": "predictions" if known else "seeds", "se": np.sqrt(total), "df": df}


def _variance_of_rows(both: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Of the mean difference over seeds; where a protocol cuts another test set for each seed, these are independent."""
    sets: dict[Any, Array] = {}
    for x, y in both:
        sets[x["rows"]] = sets.get(x["rows"], 0.0) + (x["influence"] - y["influence"]) / len(both)
    return float(sum(u @ u for u in sets.values()))


def _with_p(table: pd.DataFrame) -> pd.DataFrame:
    from scipy.special import stdtr

    gap, se, df = (table[c].to_numpy(float) for c in ("difference", "se", "df"))
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(gap == 0, 0.0, np.abs(gap) / se)
    p = np.where(np.isnan(se), np.nan, np.minimum(1.0, 2 * stdtr(np.minimum(df, 1e9), -t)))
    adjusted = np.full(len(p), np.nan)
    if (known := ~np.isnan(p)).any():
        adjusted[known] = holm(p[known])
    return table.assign(p=p, p_holm=adjusted)
