"""Paired tests of two methods on stored predictions: McNemar, paired bootstrap, permutation.

Every run keeps `predictions.parquet` beside its record (row_id, label, prediction, score, split). McNemar and the
permutation test ask about *these trained models* on new rows; the bootstrap over seeds and rows asks about the methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fronts import Mixed, refuse_mixed
from analysis.resample import BINARY, Sums, bootstrap, sums, swapped

DRAWS = 10_000


def mcnemar(b: int, c: int) -> dict[str, float]:
    """`exact`: two-sided binomial(b; b + c, 1/2). `mid_p`: with half of the observed point (Fagerland et al. 2013).

    b, c: rows that only the first, or only the second, method gets right. Without any such row both are 1.
    """
    from scipy.stats import binom

    if b + c == 0:
        return {"exact": 1.0, "mid_p": 1.0}
    tail, point = binom.cdf(min(b, c), b + c, 0.5), binom.pmf(min(b, c), b + c, 0.5)
    exact = min(1.0, 2 * tail)
    return {"exact": float(exact), "mid_p": float(2 * tail - point) if b != c else float(1 - point / 2)}


def predictions(run: Any, split: str = "test") -> pd.DataFrame:
    """The stored predictions of one row of `analysis.load`, indexed by row_id. Raises as `stored`."""
    columns = stored(run, split)
    return pd.DataFrame(columns, index=pd.Index(columns.pop("row_id"), name="row_id"))


def stored(run: Any, split: str = "test") -> dict[str, NDArray[Any]]:
    """The columns of a run's predictions of one split, in the order of row_id; a table of them would cost as much as reading.

    Raises FileNotFoundError where there are none, ValueError where the file holds something else.
    """
    path = Path(run["path"]).parent / "predictions.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no predictions of {run['method']} seed {run['seed']}: a paired test needs them"
        )
    columns = _columns(path)
    kept = np.flatnonzero(columns.pop("split") == split)
    ids = columns["row_id"][kept]
    order = kept if (ids[1:] > ids[:-1]).all() else kept[np.argsort(ids, kind="stable")]
    ids = columns["row_id"][order]
    if not len(ids) or (ids[1:] == ids[:-1]).any():
        raise ValueError(f"{path}: {len(ids)} rows of split {split!r}, which must be some and each row_id once")
    return {name: values[order] for name, values in columns.items()}


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path, pre_buffer=False).read(use_threads=False)  # a fifth of the time of pandas' own reader
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if absent := {"row_id", "label", "prediction", "split"} - set(table.column_names):
        raise ValueError(f"{path}: no column {', '.join(sorted(absent))}; there are {', '.join(table.column_names)}")
    if table["row_id"].null_count:
        raise ValueError(f"{path}: {table['row_id'].null_count} rows without row_id")
    return {name: table[name].to_numpy() for name in table.column_names}


def compare(
    runs: pd.DataFrame, a: str, b: str, *, split: str = "test", draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """Method `a` minus method `b`, one row per task and model, in the units of the task's metric.

    Columns: rows, seeds (that both ran), a, b, difference; `low`, `high` and `p_bootstrap` of the paired bootstrap (95 %
    percentiles; rows, and with more than one seed their noise: `bootstrap_difference`); `seed_sd` of the difference over
    seeds (0 for one); `p_permutation` (rows swapped between the methods); `disagree`, the share of rows where exactly one
    is right; McNemar's `b_only`, ..., `p_mcnemar`, `p_mid` for one seed of a metric that counts right answers, else missing
    (see `by_seed`); `p_holm` corrects p_bootstrap over the rows of this table.

    Raises Mixed where the runs may not be compared or were scored on other rows, ValueError without common seeds.
    """
    from analysis.ranks import holm

    chosen = _chosen(runs, (a, b))
    rows = []
    for (task, model), part in chosen.groupby(["task", "model"], sort=False):
        if set(part["method"]) != {a, b}:
            continue
        first, second, seeds, metric = pair(part, a, b, split)
        rng = np.random.default_rng(seed)
        found = test(first, second, metric, draws=draws, rng=rng)
        rows.append({"task": task, "model": model, "metric": metric, "seeds": len(seeds)} | found)
    if not rows:
        raise ValueError(f"{a} and {b} share no task and model with status ok; the runs have {_cells(runs)}")
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p_bootstrap"].to_numpy()))


def by_seed(runs: pd.DataFrame, a: str, b: str, *, split: str = "test") -> pd.DataFrame:
    """McNemar's test for each task, model and seed: one row each with a_only, b_only, p_mcnemar, p_mid, disagree."""
    rows = []
    for (task, model), part in _chosen(runs, (a, b)).groupby(["task", "model"], sort=False):
        first, second, seeds, metric = pair(part, a, b, split)
        for seed, x, y in zip(seeds, first, second, strict=True):
            found = _discordant(sums(metric, x), sums(metric, y)) if metric in BINARY else {}
            rows.append({"task": task, "model": model, "seed": seed, "rows": len(x)} | found)
    return pd.DataFrame(rows)


def test(
    a: Sequence[pd.DataFrame], b: Sequence[pd.DataFrame], metric: str, *, draws: int, rng: np.random.Generator
) -> dict[str, Any]:
    """The paired tests of two lists of aligned predictions, one table per seed."""
    classes = 0
    if metric in ("f1", "matthews"):
        classes = 1 + int(max(t[c].max() for t in [*a, *b] for c in ("label", "prediction")))
    first, second = ([sums(metric, table, classes) for table in tables] for tables in (a, b))
    scores = [[float(s.value(s.features.sum(0))) for s in part] for part in (first, second)]
    difference = float(np.mean(scores[0]) - np.mean(scores[1]))
    drawn = bootstrap_difference(first, second, draws, rng)
    null = swapped(first, second, draws, rng)
    tiny = 1e-12
    out = {
        "rows": len(a[0]),
        "a": float(np.mean(scores[0])),
        "b": float(np.mean(scores[1])),
        "difference": difference,
        "low": float(np.quantile(drawn, 0.025)),
        "high": float(np.quantile(drawn, 0.975)),
        "seed_sd": float(np.std(np.array(scores[0]) - np.array(scores[1]), ddof=1)) if len(a) > 1 else 0.0,
        "p_bootstrap": _two_sided(drawn),
        "p_permutation": float((1 + (np.abs(null) >= abs(difference) - tiny).sum()) / (1 + draws)),
    }
    return out | (_mcnemar_of(first, second) if metric in BINARY else {})


def bootstrap_difference(a: list[Sums], b: list[Sums], draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) differences of the mean over seeds: test rows drawn anew, the same for all runs, plus the noise of seeds.

    The latter is t(s - 1) sd / √s with the sd of the s differences per seed: drawing 2 to 5 seeds with replacement would
    make it far too small. With one seed there is none.
    """
    values = bootstrap([*a, *b], draws, rng)
    drawn = (values[:, : len(a)] - values[:, len(a) :]).mean(1)
    if len(a) == 1:
        return drawn
    seen = [x.value(x.features.sum(0)) - y.value(y.features.sum(0)) for x, y in zip(a, b, strict=True)]
    return drawn + rng.standard_t(len(a) - 1, draws) * np.std(seen, ddof=1) / np.sqrt(len(a))


def _two_sided(drawn: np.ndarray) -> float:
    """Twice the smaller share of draws on one side of 0; draws at 0 count half; at least 1 / (draws + 1)."""
    below = (drawn < 0).mean() + (drawn == 0).mean() / 2
    return float(max(min(1.0, 2 * min(below, 1 - below)), 1 / (len(drawn) + 1)))


def _mcnemar_of(a: list[Sums], b: list[Sums]) -> dict[str, Any]:
    each = [_discordant(x, y) for x, y in zip(a, b, strict=True)]
    return each[0] if len(each) == 1 else {"disagree": float(np.mean([e["disagree"] for e in each]))}


def _discordant(a: Sums, b: Sums) -> dict[str, Any]:
    x, y = a.features[:, 1] > 0, b.features[:, 1] > 0
    only_a, only_b = int((x & ~y).sum()), int((~x & y).sum())
    p = mcnemar(only_a, only_b)
    found = {"a_only": only_a, "b_only": only_b, "p_mcnemar": p["exact"], "p_mid": p["mid_p"]}
    return found | {"disagree": (only_a + only_b) / len(x)}


def pair(
    part: pd.DataFrame, a: str, b: str, split: str = "test"
) -> tuple[list[pd.DataFrame], list[pd.DataFrame], list[Any], str]:
    """The aligned predictions of two methods on one task and model, one table per common seed; the seeds; the metric."""
    refuse_mixed(part, strict=True)
    one_setting(part)
    tables = {name: part[part["method"] == name].drop_duplicates("seed").set_index("seed") for name in (a, b)}
    seeds = sorted(set(tables[a].index) & set(tables[b].index))
    if not seeds:
        raise ValueError(f"{a} (seeds {sorted(tables[a].index)}) and {b} ({sorted(tables[b].index)}) share no seed")
    first, second = ([_of_seed(tables[name], s, split) for s in seeds] for name in (a, b))
    for seed, x, y in zip(seeds, first, second, strict=True):
        if not x.index.equals(y.index) or not (x["label"] == y["label"]).all():
            raise Mixed(
                f"{a} and {b} with seed {seed} were scored on different rows or labels: no paired test is possible"
            )
    return first, second, seeds, str(part["metric"].iloc[0])


def _of_seed(table: pd.DataFrame, seed: Any, split: str) -> pd.DataFrame:
    return predictions(table.loc[seed].to_dict() | {"seed": seed}, split)


def one_setting(runs: pd.DataFrame) -> None:
    """Raise Mixed where a method of one task and model was run with several settings: which one is meant must be said."""
    if "settings" not in runs:
        return
    counts = runs.groupby(["task", "model", "method"], dropna=False)["settings"].nunique()
    if (counts > 1).any():
        task, model, method = counts[counts > 1].index[0]
        raise Mixed(
            f"{method} has {counts.max()} settings on {task} ({model}): keep one of them, e.g. "
            'runs[runs["config_train_lr"] == 1e-3], or choose on val with analysis.tuning.selected(runs)'
        )


def _chosen(runs: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    absent = [m for m in methods if m not in set(runs["method"])]
    if absent:
        raise ValueError(f"no runs of {', '.join(absent)}; the methods are {', '.join(sorted(set(runs['method'])))}")
    return runs[(runs["status"] == "ok") & runs["method"].isin(methods)]


def _cells(runs: pd.DataFrame) -> str:
    names = [f"{t} × {m}" for t, m in runs[["task", "method"]].drop_duplicates().itertuples(index=False)]
    return ", ".join(names[:12])
