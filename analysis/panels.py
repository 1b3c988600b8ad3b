"""The Pareto view as panels of Weights & Biases: one live chart per task, model and main cost, beside the pictures.

`python -m analysis report RUNS --wandb auto` logs them on W&B's own scatter plot, which needs no preparation. The saved panel
`pareto.vega.json` (Vega-Lite) also draws the front as a stair, the intervals and the names. To use it, save it once in an account,

    python -m analysis.panels ENTITY                  # or: a panel's menu, Custom charts, Edit, paste the file

and name it: `report RUNS --wandb online --wandb-chart ENTITY/paretune_pareto`. A report in W&B then takes the panels of the
section `pareto_panel`; with the table `results` it can filter and group them.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from typing import Any

import pandas as pd

from analysis.columns import MAIN_COSTS, axis_title
from analysis.fronts import Mixed, pareto

NAME, PLAIN = "paretune_pareto", "wandb/scatter/v0"
FIELDS = {"cost": "cost", "score": "score", "low": "low", "high": "high", "front": "front", "name": "method"}


def spec() -> str:
    """The saved panel: a Vega-Lite specification with W&B's placeholders `${field:...}` and `${string:...}`."""
    return files("analysis").joinpath("pareto.vega.json").read_text(encoding="utf-8")


def panels(table: pd.DataFrame, chart: str | None = None) -> dict[str, Any]:
    """`pareto_panel/<task> <model> <cost>` -> custom chart, for every front that may be drawn.

    table: of `summarise`, with `view` of `report.views`. chart: the name of the saved panel in W&B; without it W&B's scatter.
    """
    import wandb

    found = {}
    for (task, model, view), rows in table.groupby(["task", "model", "view"]):
        for cost in MAIN_COSTS:
            if (points := _points(rows, cost)) is None:
                continue
            data = wandb.Table(dataframe=points)
            title = {"title": f"{task}, {model}", "cost_title": axis_title(cost), "score_title": rows["metric"].iloc[0]}
            fields = FIELDS if chart else {"x": "cost", "y": "score"}
            strings = title if chart else {"title": f"{title['title']}: {title['score_title']} over {axis_title(cost)}"}
            name = f"pareto_panel/{task} {model} {cost}" + (f" {view}" if view else "")
            found[name] = wandb.plot_table(chart or PLAIN, data, fields, strings)
    return found


def _points(rows: pd.DataFrame, cost: str) -> pd.DataFrame | None:
    """method, cost, score, low, high, front of the rows that have both; None where no front may be drawn."""
    try:
        flagged = pareto(rows, cost)
    except Mixed:
        return None
    known = flagged[flagged["front"].notna()]
    columns = {"method": known["label"], "cost": known[cost], "score": known["score"], "front": known["front"]}
    ends = {end: known[f"score_{end}"].fillna(known["score"]) for end in ("low", "high")}
    return pd.DataFrame(columns | ends).astype({"front": bool}) if len(known) else None


def main() -> None:
    """Save the panel in a W&B account, so that `--wandb-chart ENTITY/paretune_pareto` can name it."""
    import wandb

    parser = argparse.ArgumentParser("python -m analysis.panels", description=main.__doc__)
    parser.add_argument("entity", help="user or team in W&B")
    entity = parser.parse_args().entity
    known: dict[str, Any] = {"spec_type": "vega2", "access": "private", "spec": spec()}
    wandb.Api().create_custom_chart(entity=entity, name=NAME, display_name="Paretune: Pareto front", **known)
    print(f"saved: --wandb-chart {entity}/{NAME}")


if __name__ == "__main__":
    main()
