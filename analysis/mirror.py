"""A copy of a report in Weights & Biases: its table, its Pareto plots and the page itself, in one W&B run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.columns import MAIN_COSTS
from analysis.fronts import Mixed
from analysis.panels import panels
from analysis.plots import pareto
from analysis.report import views
from analysis.summary import summarise
from bench.track import start


def mirror(runs: pd.DataFrame, page: Path, mode: str, project: str, chart: str | None = None) -> str:
    """Log the report `page` of `runs`; return where it went. Nothing that fails there is an error, as in a run.

    chart: the saved panel of `analysis.panels`, ENTITY/NAME; without it the Pareto panels are W&B's scatter plots.
    """
    run = start(mode, page.parent, project=project, name=page.stem, job_type="report")
    if run is None:
        return "not mirrored in W&B"
    import wandb

    table = summarise(runs)
    shown = table[["task", "model", "label", "metric", "score", "score_sd", "n", "missing", *MAIN_COSTS]]
    content: dict[str, Any] = {"results": wandb.Table(dataframe=shown)}
    content |= panels(table.assign(view=views(table)), chart)
    content |= {name: wandb.Image(figure) for name, figure in figures(table).items()}
    content["report"] = wandb.Html(page.read_text(), inject=False)
    run.log(content)
    place = run.url or str(Path(run.dir).parent)
    run.finish()
    return f"mirrored in W&B: {place}"


def figures(table: pd.DataFrame) -> dict[str, Any]:
    """The Pareto plot of each task, model and main cost for which there is one, by name."""
    import matplotlib.pyplot as plt

    found = {}
    for (task, model, view), rows in table.assign(view=views(table)).groupby(["task", "model", "view"]):
        for cost in MAIN_COSTS:
            if not (rows[cost].notna() & rows["score"].notna()).any():
                continue
            try:
                figure: Any = pareto(rows, cost).figure
            except Mixed:
                continue
            found[f"pareto/{task} {model} {cost}" + (f" {view}" if view else "")] = figure
            plt.close(figure)
    return found
