"""What the spectra of runs say together: means over seeds per setting, and correlations over runs with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.summary import LEVEL, summarise

COLUMNS = {
    "val": "{val}",
    "intruders": "spectra_intruders",
    "at 0.7": "spectra_intruders_at_0.7",
    "at 0.9": "spectra_intruders_at_0.9",
    "share": "spectra_share",
    "effective rank": "spectra_effective_rank",
    "size": "spectra_norm_ratio",
    "forgetting": "forgetting_forgetting",
}


def settings(runs: pd.DataFrame, columns: dict[str, str] | None = None) -> pd.DataFrame:
    """One row per task, model and setting: `label`, `n` seeds, and of each column mean `x` and half interval `x ±`.

    runs: `analysis.load(...)`. columns: names here to names there; those that no run has are left out, `{val}` is the score on
    val. The interval is Student's t, 95 %; NaN with one seed.
    """
    from scipy import stats

    runs = runs[runs["status"] == "ok"]
    known = {k: c.format(val=f"metrics_val/{runs['metric'].iloc[0]}") for k, c in (columns or COLUMNS).items()}
    known = {k: c for k, c in known.items() if c in runs and runs[c].notna().any()}
    keys = ["task", "model", "settings"]
    groups = runs.astype(dict.fromkeys(known.values(), float)).groupby(keys, sort=False)
    found = pd.DataFrame({"n": groups.size()})
    for name, column in known.items():
        one = groups[column]
        wide = stats.t.ppf((1 + LEVEL) / 2, (one.count() - 1).where(one.count() > 1))
        found[name], found[f"{name} ±"] = one.mean(), wide * one.std() / np.sqrt(one.count())
    labels = summarise(runs).drop_duplicates(keys).set_index(keys)["label"]
    return found.join(labels).reset_index()


def correlation(
    runs: pd.DataFrame, x: str = "spectra_intruders", y: str = "forgetting_forgetting", given: str | None = None
) -> dict[str, float]:
    """Spearman's rho of two columns over runs, `low` and `high` of 2,000 bootstrap draws of runs (95 %), `n`.

    given: a third column whose ranks are taken out of both first (partial correlation), such as the size of the change.
    Raises ValueError for fewer than four runs that have all of them.
    """
    names = [x, y] if given is None else [x, y, given]
    values = runs.dropna(subset=names)[names].to_numpy(float)
    if len(values) < 4:
        raise ValueError(f"{len(values)} runs have {' and '.join(names)}: a correlation takes four or more")
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    drawn = [_spearman(values[rows]) for rows in draws]
    low, high = pd.Series(drawn).quantile([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"rho": _spearman(values), "low": low, "high": high, "n": len(values)}


def _spearman(values: np.ndarray) -> float:
    """Of the first two columns of (n, 2 or 3); given the third where there is one. NaN where one is constant."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0)
    ranks -= ranks.mean(0)
    if values.shape[1] == 3:
        third = ranks[:, 2]
        ranks = ranks - np.outer(third, third @ ranks) / max(third @ third, 1e-9)
    a, b = ranks[:, 0], ranks[:, 1]
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 1e-6 else float("nan")


def sizes(folder: Path) -> pd.DataFrame:
    """Counts of each run below `folder` at the sizes of its sizes.parquet (`python -m analysis sizes`), a row per run."""
    from analysis.sizes import counts

    rows = []
    for path in sorted(folder.glob("*/sizes.parquet")):
        found = counts(pd.read_parquet(path)).set_index("size")["intruders"]
        rows.append({"id": path.parent.name} | {f"size_{size:g}": count for size, count in found.items()})
    return pd.DataFrame(rows or {"id": []})


def text(folder: Path) -> str:
    """Both as text: settings of each task and model, correlations of intruders with forgetting and with val."""
    from analysis.runs import load

    runs = load(folder).merge(sizes(folder), on="id", how="left")
    scaled = {f"at {c.replace('_', ' ')}": c for c in map(str, runs) if c.startswith("size_")}
    parts = []
    for (task, model), part in runs[runs["status"] == "ok"].groupby(["task", "model"], sort=False):
        table = settings(part, COLUMNS | scaled)
        parts.append(f"{model}, {task}; mean ± half of the 95 % interval over seeds\n{_markdown(table)}")
        parts.append("\n".join(_correlations(part)))
    return "\n\n".join(parts)


def _correlations(runs: pd.DataFrame) -> Iterator[str]:
    """Of intruders with forgetting and with the score on val, alone and given the size, where four runs have them."""
    x, size = "spectra_intruders", "spectra_norm_ratio"
    for name, y in ("forgetting", "forgetting_forgetting"), ("val", f"metrics_val/{runs['metric'].iloc[0]}"):
        if {x, y} <= set(runs) and runs[[x, y, size]].notna().all(axis=1).sum() >= 4:
            for about, given in ("", None), (" given the size", size):
                found = correlation(runs, x, y, given)
                yield (
                    f"Spearman, intruders and {name}{about}: "
                    + "{rho:.2f} ({low:.2f} to {high:.2f}), {n} runs".format(**found)
                )


def _markdown(table: pd.DataFrame) -> str:
    names = [c for c in map(str, table) if f"{c} ±" in table]
    lines = [f"| setting | n | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for _, row in table.iterrows():
        cells = [_cell(row[c], row[f"{c} ±"]) for c in names]
        lines.append(f"| {row['label']} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(mean: float, half: float) -> str:
    return f"{mean:.3g} ± {half:.2g}" if np.isfinite(half) else f"{mean:.3g}"
