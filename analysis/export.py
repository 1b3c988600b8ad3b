"""`python -m analysis export`: the summarised results as CSV (every column), Markdown or LaTeX (a table for a paper)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.columns import COSTS, MAIN_COSTS, write
from analysis.text import align

FORMATS = ("csv", "markdown", "latex")
_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def export(table: pd.DataFrame, form: str, costs: Sequence[str] = MAIN_COSTS) -> str:
    """The table of `summarise` as text in one of `FORMATS`.

    csv: every column, full precision, in the units of the record. markdown, latex: task, model, method, score ± sd over n
    seeds, and the costs with units; the best mean of each task and model is bold, which says nothing about significance.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is none of {', '.join(FORMATS)}")
    if form == "csv":
        return table.to_csv(index=False)
    heads = ["task", "model", "method", "score", "n", *(COSTS[c].title.lower() for c in costs)]
    best = table.groupby(["task", "model"])["score"].transform("max")
    rows = [
        _cells(row, costs, form, row["score"] == top) for row, top in zip(table.to_dict("records"), best, strict=True)
    ]
    return _markdown(heads, rows) if form == "markdown" else _latex(heads, rows)


def _cells(row: dict, costs: Sequence[str], form: str, bold: bool) -> list[str]:
    pm = "±" if form == "markdown" else r"$\pm$"
    spread = "" if pd.isna(row["score_sd"]) else f" {pm} {row['score_sd']:.3f}"
    score = "–" if pd.isna(row["score"]) else f"{row['score']:.3f}{spread}"
    names = [str(row[c]) for c in ("task", "model", "label")]
    values = [write(row[c], COSTS[c].unit) for c in costs]
    if form == "markdown":
        names = [n.replace("|", "\\|") for n in names]
        return [*names, f"**{score}**" if bold else score, str(row["n"]), *values]
    plain = [latex(text) for text in (*names, str(row["n"]), *values)]
    score = score.replace("–", "--")
    return [*plain[:3], rf"\textbf{{{score}}}" if bold else score, *plain[3:]]


def texts(heads: Sequence[str], rows: Sequence[Sequence[str]], form: str, notes: Sequence[str] = ()) -> str:
    """A table of ready cells as "text", "markdown" or "latex", its cells escaped, with notes below (comments in LaTeX)."""
    if form == "text":
        return "\n".join([*align([list(heads), *map(list, rows)]), *(["", *notes] if notes else [])])
    if form == "markdown":
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        return _markdown(list(heads), cells) + "".join(f"\n{note}\n" for note in notes)
    return _latex(list(heads), [[latex(cell) for cell in row] for row in rows]) + "".join(f"% {n}\n" for n in notes)


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_SPECIAL.get(c, c) for c in text).replace("–", "--")


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _latex(heads: list[str], rows: list[list[str]]) -> str:
    body = [" & ".join(line) + r" \\" for line in rows]
    head = " & ".join(latex(h) for h in heads) + r" \\"
    frame = [rf"\begin{{tabular}}{{lll{'r' * (len(heads) - 3)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*frame, r"\bottomrule", r"\end{tabular}", "% needs \\usepackage{booktabs}"]) + "\n"
