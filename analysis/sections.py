"""What the report shows besides its table, as plain JSON values: learning curves, significance, ranks, tuning, spectra.

Every part follows the guard of comparisons: rows of different conditions are in different sets (`view`), pairs of different
software have no p-value, and an overview over tasks that cannot be made says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import ranks, tuning
from analysis.columns import METRICS
from analysis.fronts import Mixed
from analysis.pairs import Problems, all_pairs
from analysis.plots_runs import history_of

POINTS = 60  # of a learning curve
SPECTRA = "spectra_"
LAYERS, KINDS = 128, 16  # of a model, at most


def number(value: Any, digits: int = 6) -> float | None:
    """A finite number to some significant digits, which halves the file; None for anything else."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


Run = dict[Any, Any]  # a row of `analysis.load`


def curves(runs: Iterable[Run]) -> dict[str, Any]:
    """Of each quantity in the histories of one row's runs: [steps, means over seeds] and, of several seeds, lowest, highest."""
    found: dict[str, list[dict[float, float]]] = {}
    for path in dict.fromkeys(run["path"] for run in runs if "path" in run):
        history = history_of(path)
        for name in dict.fromkeys(key for point in history for key in point if key != "step"):
            values = {p["step"]: p[name] for p in history if name in p}
            found.setdefault(name, []).append(values)
    return {name: _thinned(seeds) for name, seeds in found.items() if len(set().union(*seeds)) > 1}


def _thinned(seeds: list[dict[float, float]]) -> list[list[float | None]]:
    order = sorted(set().union(*seeds))
    kept = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, POINTS).round().astype(int))]
    values = [[seed[s] for seed in seeds if s in seed] for s in kept]
    means = [number(sum(v) / len(v), 4) for v in values]
    if max(map(len, values)) == 1:
        return [[number(s) for s in kept], means]
    return [[number(s) for s in kept], means, *([number(end(v), 4) for v in values] for end in (min, max))]


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method: of several settings the one with the best val; without val none of them can be chosen."""
    columns = {m: f"{METRICS}val/{m}" for m in set(rows["metric"])}
    val = [row.get(columns[row["metric"]], math.nan) for row in rows.to_dict("records")]
    ranked = rows.assign(val=val, alone=~rows["method"].duplicated(keep=False))
    ranked = ranked[(ranked["alone"] | ranked["val"].notna()) & ranked["score"].notna()]
    return ranked.sort_values("val", ascending=False, kind="stable").drop_duplicates("method").sort_index()


def _sets(table: pd.DataFrame) -> Any:
    """((task, model, view), rows) of each set of rows that may be compared."""
    return table.groupby(["task", "model", "view"], sort=False)


def picked(table: pd.DataFrame) -> pd.Series:
    """Whether a row is the one of its method in its task, model and view, as `chosen` says."""
    parts = [chosen(rows).index for _, rows in _sets(table)]
    return pd.Series(table.index.isin(np.concatenate(parts)), index=table.index)


def matrices(table: pd.DataFrame, runs: dict[str, Run], problems: Problems) -> list[dict[str, Any]]:
    """Of each task, model and view with several methods: their names and every pair, [i, j, difference, p_holm, evidence].

    table: of `summarise`, with `view`. runs: id -> run. Predictions that cannot be used are added to `problems`.
    """
    found = []
    for (task, model, view), rows in _sets(table):
        rows = rows[rows["picked"]].sort_values("score", ascending=False)
        if len(rows) < 2:
            continue
        names = rows["label"].tolist()
        own = {label: finished(runs[i] for i in ids) for label, ids in zip(names, rows["ids"], strict=True)}
        pairs = all_pairs(own, problems).to_dict("records")
        place = {name: i for i, name in enumerate(names)}
        cells = [[place[p["first"]], place[p["second"]], *_said(p)] for p in pairs]
        found.append({"task": task, "model": model, "view": int(view), "names": names, "pairs": cells})
    return found


def finished(runs: Iterable[Run]) -> list[Run]:
    """Those with status ok and a score, one per seed."""
    done = {run["seed"]: run for run in runs if run["status"] == "ok" and math.isfinite(run["score"])}
    return list(done.values())


def _said(pair: dict[Any, Any]) -> list[Any]:
    return [number(pair["difference"], 4), number(pair["p_holm"], 3), pair["evidence"]]


def overviews(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each model (real and stand-in data apart): mean ranks, critical differences and Wilcoxon p-values over its tasks."""
    ok = runs[(runs["status"] == "ok") & runs["score"].notna()]
    keys = [c for c in ("model", "data_standin", "source") if c in ok]
    parts = ok.groupby(keys, sort=False, dropna=False)
    return [{"model": str(k[0])} | _overview(part) for k, part in parts if part["task"].nunique() > 1]


def _overview(part: pd.DataFrame) -> dict[str, Any]:
    names, tasks = list(dict.fromkeys(part["method"])), part["task"].nunique()
    whole = [m for m, own in part.groupby("method", sort=False) if own["task"].nunique() == tasks]
    facts: dict[str, Any] = {"tasks": sorted(set(part["task"])), "left": sorted(set(names) - set(whole))}
    if len(whole) < 3:
        return facts | {"reason": f"{len(whole)} methods have a score on all {tasks} tasks: ranks need 3"}
    part = part[part["method"].isin(whole)]
    try:
        one = part.groupby([*ranks.BLOCK, "method"])["settings"].nunique().max() <= 1
        scores = ranks.by_task(part if one else tuning.selected(part))
        diagram = ranks.critical_difference(scores)
    except (Mixed, ValueError) as error:
        return facts | {"reason": str(error)}
    p = ranks.wilcoxon_pairs(scores).loc[diagram["method"], diagram["method"]].to_numpy()
    about: dict[str, Any] = {"names": diagram["method"].tolist(), "ranks": [number(r, 4) for r in diagram["mean_rank"]]}
    about |= {"bars": diagram.attrs["bars"], "cd": number(diagram.attrs["cd"], 4)}
    pairs = [[i, j, None, number(p[i, j], 3), "tasks"] for i in range(len(p)) for j in range(i + 1, len(p))]
    return facts | about | {"friedman": number(diagram.attrs["friedman_p"], 3), "pairs": pairs}


def budgets(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Best-at-n curves of the methods with several settings in a view: [n, expected test score, low, high] each."""
    found = []
    for (task, model, view), rows in _sets(table):
        tried = chosen_by(rows)
        if tried["method"].duplicated().any() and tried["val"].notna().any():
            lines = tuning.curve(tried[tried.groupby("method")["val"].transform("count") > 1], draws=200)
            series = [_line(name, own) for name, own in lines.groupby("method", sort=False)]
            found.append({"task": task, "model": model, "view": int(view), "series": series})
    return found


def chosen_by(rows: pd.DataFrame) -> pd.DataFrame:
    """method, task, val and score of each setting (mean over seeds), for `tuning.curve`."""
    val = [row.get(f"{METRICS}val/{row['metric']}", math.nan) for row in rows.to_dict("records")]
    return rows[["method", "task", "model", "score"]].assign(val=val)


def _line(name: Any, own: pd.DataFrame) -> dict[str, Any]:
    columns = [[number(v, 5) for v in own[c]] for c in ("n", "test", "test_low", "test_high")]
    return {"name": str(name), "points": columns}


def spectra(runs: Iterable[Run]) -> dict[str, float]:
    """Means over a row's runs of what the spectra of their weights said, e.g. intruders, effective_rank; empty without."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for key in (k for k in run if k.startswith(SPECTRA)):
            if number(run[key]) is not None:
                found.setdefault(key.removeprefix(SPECTRA), []).append(run[key])
    return {key: float(f"{sum(values) / len(values):.4g}") for key, values in found.items()}


def forgetting(runs: Iterable[Run]) -> dict[str, Any]:
    """The mean over a row's runs of what the model lost of its pretraining, and its measure; empty without."""
    known = [run for run in runs if type(run.get("forgetting_forgetting")) in (int, float)]
    lost = [run["forgetting_forgetting"] for run in known if number(run["forgetting_forgetting"]) is not None]
    return (
        {"lost": number(sum(lost) / len(lost), 4), "measure": str(known[0].get("forgetting_measure"))} if lost else {}
    )


def layers(runs: Iterable[Run], problems: Problems) -> dict[str, Any]:
    """Intruders and share of the squared change in each layer and kind of matrix, means over a row's runs; empty without.

    From the spectra.parquet beside a record whose `spectra` speak of a change. {"layers": [...], "kinds": [...], "intruders":
    [[...], ...], "share": [[...], ...]}: a row per layer, null where it has no such matrix.
    """
    found = [part for run in runs if run.get("spectra_changed") if (part := _matrices_of(run, problems)) is not None]
    if not found:
        return {}
    cells = pd.concat(found).groupby(["layer", "kind"], sort=False)[["intruders", "share"]].sum() / len(found)
    kinds = list(dict.fromkeys(cells.index.get_level_values("kind")))[:KINDS]
    grids = {name: cells[name].unstack("kind")[kinds].sort_index().iloc[:LAYERS] for name in cells}
    shown = {str(name): [[number(v, 3) for v in row] for row in grid.to_numpy()] for name, grid in grids.items()}
    return {"layers": [int(i) for i in grids["share"].index], "kinds": kinds} | shown


def _matrices_of(run: Run, problems: Problems) -> pd.DataFrame | None:
    """layer, kind, intruders and share of each matrix of one run, with the k and epsilon of its record."""
    path = Path(run["path"]).with_name("spectra.parquet")
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path, columns=["layer", "kind", "cos_left", "norm", "norm_ratio"])
        k, epsilon = int(run["spectra_k"]), float(run["spectra_epsilon"])
        counts = [int((np.asarray(c[:k], float) < epsilon).sum()) for c in table["cos_left"]]
        squares = (table["norm"].astype(float) * table["norm_ratio"].astype(float)) ** 2
        share = squares / squares.sum()
        return pd.DataFrame({"layer": table["layer"].astype(int), "kind": table["kind"].astype(str)}).assign(
            intruders=counts, share=share
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        problems.append((str(path), f"{type(error).__name__}: {error}"))
        return None


def sweep(runs: Iterable[Run], problems: Problems) -> dict[str, Any]:
    """Score and forgetting with one singular vector of each matrix scaled by lambda, mean, lowest and highest run.

    {"score": {"intruder": [lambdas, means, lows, highs], "neighbour": ...}, "forgetting": ..., "split", "which", "runs"} from
    the causal.parquet beside the records (`python -m analysis causal`); only runs that were swept as the first was; empty
    without.
    """
    tables = [table for run in runs if (table := _swept(run, problems)) is not None]
    how = [tuple(table[["split", "which"]].iloc[0]) for table in tables]
    if not tables:
        return {}
    same = pd.concat([table for table, own in zip(tables, how, strict=True) if own == how[0]])
    shown: dict[str, Any] = {"split": str(how[0][0]), "which": str(how[0][1]), "runs": how.count(how[0])}
    for value in ("score", "forgetting"):
        cells = same.dropna(subset=value).groupby(["vector", "lambda"])[value].agg(["mean", "min", "max"]).reset_index()
        parts = {str(v): part[["lambda", "mean", "min", "max"]].to_numpy().T for v, part in cells.groupby("vector")}
        shown[value] = {v: [[number(x, 5) for x in line] for line in part] for v, part in parts.items()}
    return shown


def _swept(run: Run, problems: Problems) -> pd.DataFrame | None:
    path = Path(run["path"]).with_name("causal.parquet")
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path, columns=["vector", "lambda", "score", "forgetting", "split", "which"])
        return table.astype({"lambda": float, "score": float, "forgetting": float}) if len(table) else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        problems.append((str(path), f"{type(error).__name__}: {error}"))
        return None
