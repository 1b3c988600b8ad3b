"""Averages over a suite of tasks as papers print them: the mean of all tasks, and the mean of the means of its groups.

VTAB-1k has both: the plain mean of 19 (arXiv 1910.04867, SSF) and the mean of three group means (VPT, NOAH); the same 19
scores of LoRA give 72.25 and 74.60. An average of other tasks than the suite's is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.fronts import Mixed
from analysis.text import align
from tasks import suite as members

STANDIN = " (stand-in)"


def suite_average(table: pd.DataFrame, suite: str = "vtab") -> pd.DataFrame:
    """One row per model and method that has a score on every task of the suite, best first.

    table: as `summarise` makes it. Columns: model, method, one per group with its mean, `mean` of all tasks, `group_mean`
    (missing without groups), `n` seeds at least, `data_standin`. attrs["missing"]: the tasks that the others lack.

    Raises ValueError for an unknown suite, a task with several settings of one method, or where nobody has all tasks
    (naming them); Mixed where one average would hold generated and real rows.
    """
    groups = members(suite)
    if not groups:
        raise ValueError(f"no task belongs to a suite {suite!r}; the suites are vtab, glue, commonsense and fgvc")
    rows, missing = [], {}
    known = table[table["score"].notna()].assign(task=table["task"].str.removesuffix(STANDIN))
    for (model, method), part in known[known["task"].isin(groups)].groupby(["model", "method"], sort=False):
        name = f"{method} on {model}"
        if lacking := sorted(set(groups) - set(part["task"])):
            missing[name] = lacking
            continue
        _refuse_several(part, name)
        rows.append({"model": model, "method": method} | _average(part, groups))
    if not rows:
        raise ValueError(_incomplete(suite, groups, missing))
    out = pd.DataFrame(rows).sort_values(["model", "mean"], ascending=[True, False], ignore_index=True)
    out.attrs["missing"] = missing
    return out


def _average(part: pd.DataFrame, groups: Mapping[str, str | None]) -> dict[str, float | int | bool]:
    scores = part.set_index("task")["score"].astype(float)
    names = dict.fromkeys(g for g in groups.values() if g is not None)
    means = {g: float(scores[[t for t in groups if groups[t] == g]].mean()) for g in names}
    both = {"mean": float(scores.mean()), "group_mean": float(np.mean(list(means.values()))) if means else np.nan}
    return means | both | {"n": int(part["n"].min()), "data_standin": bool(part["data_standin"].any())}


def _refuse_several(part: pd.DataFrame, name: str) -> None:
    if part["data_standin"].nunique() > 1:
        generated = sorted(part["task"][part["data_standin"].astype(bool)])
        raise Mixed(f"{name}: the rows of {', '.join(generated)} are generated, those of the other tasks are real")
    twice = sorted(part["task"][part["task"].duplicated()].unique())
    if twice:
        raise ValueError(f"{name} has several settings or sources on {', '.join(twice)}; average runs of one setting")


def _incomplete(suite: str, groups: Mapping[str, str | None], missing: Mapping[str, list[str]]) -> str:
    said = "; ".join(lacks(name, tasks, len(groups)) for name, tasks in missing.items()) or "there is no run of it"
    return f"no method has a score on all {len(groups)} tasks of {suite}: {said}"


def lacks(name: str, tasks: list[str], total: int) -> str:
    """`lora on vit_b16 has 17 of 19, without vtab_dtd, vtab_svhn`."""
    return f"{name} has {total - len(tasks)} of {total}, without {', '.join(tasks)}"


def text(table: pd.DataFrame, suite: str) -> str:
    """The averages as aligned text, and below them who is left out and why."""
    averages = suite_average(table, suite)
    total = len(members(suite))
    columns = [c for c in averages.columns if c not in ("n", "data_standin") and averages[c].notna().any()]
    heads = [f"mean{total}" if c == "mean" else c for c in columns]
    lines = [[*heads, "n"]]
    for _, row in averages.iterrows():
        cells = [f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        cells[1] += STANDIN if row["data_standin"] else ""
        lines.append([*cells, str(row["n"])])
    left_out = [f"not averaged: {lacks(name, tasks, total)}" for name, tasks in averages.attrs["missing"].items()]
    return "\n".join([*align(lines), *([""] if left_out else []), *left_out])
