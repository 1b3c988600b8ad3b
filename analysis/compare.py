"""`python -m analysis compare`: two or more methods, with every number that says whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import paired, power, ranks
from analysis.export import texts
from analysis.text import align
from analysis.tuning import selected

ALPHA = 0.05
_HEAD, _TESTS = ("task", "model", "metric", "rows", "seeds"), ("difference [95 %]", "p (Holm)", "disagree", "verdict")
_NOTE = (
    "paired bootstrap of test rows, seeds by Student's t; one seed speaks of these trained models, not of the methods"
)


def compare(runs: pd.DataFrame, methods: Sequence[str], task: str | None = None) -> str:
    """The comparison as text: each other method against the first, per task on stored predictions, then over tasks.

    A method that was run with several settings on a task takes part with the one that val chose. Raises as the tests do.
    """
    if len(methods) < 2 or len(set(methods)) < len(methods):
        raise ValueError(f"--methods {','.join(methods)}: give two or more different methods, e.g. --methods lora,dora")
    runs, notes = prepared(runs, methods, task)
    parts = [notes] if notes else []
    parts += [pair_text(runs, methods[0], other) for other in methods[1:]]
    scores = ranks.by_task(runs, methods)
    if scores.attrs["dropped"]:
        parts.append(f"not finished by all, left out of what follows: {', '.join(scores.attrs['dropped'])}")
    parts.append(_over_tasks(scores, methods[0]))
    if runs["data_standin"].any():
        parts.append("(stand-in): generated rows that only show that everything runs; no result about a method")
    return "\n\n".join(parts)


def table(runs: pd.DataFrame, methods: Sequence[str], form: str) -> str:
    """The paired tests of each other method against the first as "csv" (every column), "markdown" or "latex"."""
    runs, notes = prepared(runs, methods, None)
    found = [power.detectable(paired.compare(runs, methods[0], other)).assign(other=other) for other in methods[1:]]
    rows = pd.concat(found, ignore_index=True)
    rows.insert(2, "method", methods[0])
    rows.insert(3, "other", rows.pop("other"))
    if form == "csv":
        return rows.to_csv(index=False)
    facts = [[row["method"], row["other"], *_line(row)] for row in rows.to_dict("records")]
    head = ["method", "other", *_HEAD, "of the first", "of the other", *_TESTS]
    return texts(head, facts, form, [_NOTE, *([notes] if notes else [])])


def prepared(
    runs: pd.DataFrame, methods: Sequence[str] | None = None, task: str | None = None
) -> tuple[pd.DataFrame, str]:
    """The finished runs of the methods (all), one setting each; a note where val had to choose."""
    methods = sorted(set(runs["method"])) if methods is None else methods
    absent = [m for m in methods if m not in set(runs["method"])]
    if absent:
        raise ValueError(f"no runs of {', '.join(absent)}; the methods are {', '.join(sorted(set(runs['method'])))}")
    if task is not None and task not in set(runs["task"]):
        raise ValueError(f"--task {task!r} is not in the runs; they have {', '.join(sorted(set(runs['task'])))}")
    runs = runs[runs["method"].isin(methods) & ((runs["task"] == task) if task else True)]
    ok = runs[(runs["status"] == "ok") & runs["score"].notna()]
    settings = ok.groupby(["task", "model", "method"])["settings"].nunique()
    if (settings <= 1).all():
        return ok, ""
    several = settings[settings > 1].reset_index(name="settings").to_dict("records")
    tried = ", ".join(f"{row['method']} on {row['task']}: {row['settings']}" for row in several)
    return selected(runs), f"settings chosen on val among those that were tried ({tried})"


def pair_text(runs: pd.DataFrame, a: str, b: str) -> str:
    """`a` against `b` on every task that both ran, from stored predictions; or from seeds where there are none."""
    title = f"{a} minus {b}, per task"
    try:
        table = power.detectable(paired.compare(runs, a, b))
    except FileNotFoundError as error:
        return f"{title}: {error}. Only the comparison over tasks is possible."
    lines = [[*_HEAD, a, b, *_TESTS], *(_line(row) for row in table.to_dict("records"))]
    return "\n".join([title, *align(lines), _NOTE])


def _line(row: dict[Any, Any]) -> list[str]:
    gap = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
    share = f"{row['disagree']:.3f}" if pd.notna(row.get("disagree")) else "–"
    facts = [str(row[c]) for c in ("task", "model", "metric", "rows", "seeds")]
    return [*facts, f"{row['a']:.4f}", f"{row['b']:.4f}", gap, f"{row['p_holm']:.3g}", share, verdict(row)]


def verdict(row: Any) -> str:
    """`first better`, `second better`, or that nothing can be said and what could have been seen."""
    if row["p_holm"] < ALPHA:
        return "first better" if row["difference"] > 0 else "second better"
    could = row.get("detectable", np.nan)
    return "cannot tell" + (f" (needs a difference of {could:.3f})" if pd.notna(could) else "")


def _over_tasks(scores: pd.DataFrame, reference: str) -> str:
    if len(scores) < 2:
        return f"over tasks: {len(scores)} task, so no test over tasks"
    table = ranks.wilcoxon(scores, reference)
    head = ["method", f"minus {reference} (mean)", "win", "tie", "loss", "p (Wilcoxon)", "p (Holm)"]
    lines = [head]
    for row in table.to_dict("records"):
        counts = [str(row[c]) for c in ("win", "tie", "loss")]
        lines.append([row["method"], f"{row['difference']:+.4f}", *counts, f"{row['p']:.3g}", f"{row['p_holm']:.3g}"])
    text = [f"over {len(scores)} tasks, means over seeds", *align(lines)]
    least = 2.0 ** (1 - len(scores))
    if least > ALPHA:
        text.append(f"{len(scores)} tasks cannot give p below {least:.3g}: this test cannot decide")
    return "\n".join([*text, *(_ranks_text(scores) if scores.shape[1] > 2 else [])])


def _ranks_text(scores: pd.DataFrame) -> list[str]:
    found, ordered = ranks.friedman(scores), ranks.critical_difference(scores)
    names = ordered["method"].tolist()
    shown = ", ".join(f"{m} {r:.2f}" for m, r in zip(names, ordered["mean_rank"], strict=True))
    bars = ["{" + ", ".join(names[first : last + 1]) + "}" for first, last in ordered.attrs["bars"]]
    text = f"Friedman p = {found['p']:.3g}; mean ranks: {shown}; critical difference (Nemenyi) {found['cd']:.2f}"
    return ["", text, f"cannot be told apart: {'; '.join(bars)}" if bars else "all pairs differ"]
