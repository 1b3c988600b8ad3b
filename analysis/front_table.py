"""The front as a table: which methods no other beats, how sure that is, and how much of the front is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import COSTS, write
from analysis.export import texts
from analysis.front_chance import chance, epsilon_front, hypervolume
from analysis.fronts import signs

MARGIN = 0.1  # the reference point lies this far beyond the worst value, in units of the range


def front_table(
    runs: pd.DataFrame, costs: Sequence[str], score: str = "score", *, lower: bool = False, epsilon: float = 0.01
) -> pd.DataFrame:
    """One row per task, model and method, cheapest first: means, `front`, `chance` (`redrawn` says of what), and more.

    `epsilon_front`: in the smallest set that leaves no row more than `epsilon` behind in the score at no more cost.
    `volume`: the share of the front's hypervolume that is lost without the method; attrs["hypervolume"] has the volumes by
    task and model. They are of costs and scores scaled to [0, 1] over all methods (costs as logarithms where they span more
    than a decade), up to a reference point 0.1 beyond the worst of each.

    costs: one or two columns, minimised. lower: the score is minimised. One setting per method (`compare.prepared`).
    """
    for name in (*costs, score):
        if name not in runs:
            raise ValueError(f"no column {name!r}; the runs have {', '.join(map(str, runs.columns[:30]))}, ...")
    if not 1 <= len(costs) <= 2:
        raise ValueError(f"--cost {','.join(costs)}: give one or two columns")
    sign = -1.0 if lower else 1.0
    found, redrawn = _chance(runs.assign(score=sign * runs[score].astype(float)), costs, rows=score == "score")
    parts = [_one(part, costs, epsilon) for _, part in found.groupby(["task", "model"], sort=False)]
    table = pd.concat(parts, ignore_index=True)
    volumes = {key: part["hypervolume"].iloc[0] for key, part in table.groupby(["task", "model"], sort=False)}
    table = table.assign(score=sign * table["score"], redrawn=redrawn).drop(columns="hypervolume")
    table.attrs["hypervolume"] = volumes
    return table


def _chance(runs: pd.DataFrame, costs: Sequence[str], rows: bool) -> tuple[pd.DataFrame, str]:
    """With test rows and seeds redrawn where predictions are stored on common rows, else with seeds alone."""
    if rows:
        try:
            return chance(runs, costs, rows=True), "seeds and test rows"
        except (FileNotFoundError, ValueError):
            pass  # nothing stored, or another test set for each seed; what else is wrong is raised below
    found = chance(runs, costs)
    return found, "seeds" if found["chance"].notna().any() else "nothing (one seed)"


def _one(part: pd.DataFrame, costs: Sequence[str], epsilon: float) -> pd.DataFrame:
    part = part.sort_values([*costs, "score"], ignore_index=True)
    part = epsilon_front(part, dict.fromkeys(costs, 0.0) | {"score": epsilon})
    scaled = np.column_stack([*(_scaled(part[c]) for c in costs), _scaled(part["score"], log=False)])
    values = scaled * signs([*costs, "score"], ["score"])
    worst = [*[1 + MARGIN] * len(costs), MARGIN]
    whole = hypervolume(values, worst)
    lost = [whole - hypervolume(np.delete(values, i, axis=0), worst) for i in range(len(values))]
    return part.assign(volume=np.array(lost) / whole, hypervolume=whole)


def _scaled(values: pd.Series, log: bool = True) -> np.ndarray:
    """To [0, 1]; costs over more than a decade as logarithms, 0 a decade below the smallest other one."""
    x = values.to_numpy(float)
    positive = x[x > 0]
    if log and len(positive) and positive.max() > 10 * positive.min():
        x = np.log10(np.where(x > 0, x, positive.min() / 10))
    span = np.ptp(x)
    return (x - x.min()) / span if span else np.zeros(len(x))


def write_front(table: pd.DataFrame, costs: Sequence[str], score: str, form: str, notes: Sequence[str] = ()) -> str:
    """The rows of `front_table` as "text", "csv" (every column), "markdown" or "latex"."""
    if form == "csv":
        return table.to_csv(index=False)
    heads = ["task", "model", "method", score, *(COSTS[c].title.lower() if c in COSTS else c for c in costs)]
    heads += ["seeds", "on the front", "epsilon", "volume"]
    rows = [_cells(row, costs) for row in table.to_dict("records")]
    volumes = "; ".join(f"{task}, {model}: {v:.3f}" for (task, model), v in table.attrs["hypervolume"].items())
    about = [
        f"on the front: share of draws of {', '.join(sorted(set(table['redrawn'])))} (* on the front of the means)"
    ]
    about.append("epsilon: one of the few that leave no method more than --epsilon behind at its cost")
    about.append(f"hypervolume of the scaled front: {volumes}; volume: the share lost without the method")
    return texts(heads, rows, form, [*notes, *about])


def _cells(row: dict[Any, Any], costs: Sequence[str]) -> list[str]:
    share = "–" if pd.isna(row["chance"]) else f"{row['chance']:.0%}"
    values = [write(row[c], COSTS[c].unit if c in COSTS else "") for c in costs]
    on = [f"{share} *" if row["front"] else share, "yes" if row["epsilon_front"] else "", f"{row['volume']:.0%}"]
    return [row["task"], row["model"], row["method"], f"{row['score']:.3f}", *values, str(row["seeds"]), *on]
