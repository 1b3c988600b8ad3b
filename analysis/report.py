"""One interactive HTML file of a folder of runs: no network, no dependency, opens from disk.

The page is `page.html` with `page.css` and the scripts of `SCRIPTS` inlined; the results travel as JSON, and the scripts build
every element through `textContent`, so that nothing in a record can act as markup.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import sections
from analysis.columns import COSTS, MAIN_COSTS, METRICS, Column, is_score
from analysis.fronts import Mixed, refuse_mixed
from analysis.sections import number
from analysis.summary import summarise
from bench.record import STATUSES, write_atomically

SCRIPTS = ("plot.js", "charts.js", "parts.js", "page.js")
_DATA_FACTS = ("kind", "path", "name", "revision", "protocol", "licence", "rows_train", "rows_val", "rows_test")


def report(runs: pd.DataFrame, path: str | Path = "report.html", title: str = "Paretune report") -> Path:
    """Write the report of the runs of `analysis.load`; return its path. The state of the page is in its address,

    e.g. `report.html#task=stsb&cost=memory_peak&methods=lora,dora`.
    """
    page = _part("page.html")
    content = json.dumps(payload(runs, title), allow_nan=False).replace("<", "\\u003c")
    parts = {"style": _part("page.css"), "script": "\n".join(map(_part, SCRIPTS)), "data": content}
    for name, text in parts.items():
        page = page.replace(f"/*{name}*/", text, 1)
    write_atomically(Path(path), page)
    return Path(path)


def payload(runs: pd.DataFrame, title: str) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON values."""
    table = summarise(runs)
    columns = [c for c in table.columns if (c in COSTS or is_score(c)) and not c.endswith(("_sd", "_low", "_high"))]
    columns = [c for c in columns if table[c].notna().any()]
    table["view"] = views(table)
    table["picked"] = sections.picked(table)
    by_id = {str(run["id"]): run for run in runs.to_dict("records")}
    shown, settings = [*(c for c in columns if c in COSTS)], _settings(runs)
    problems = [*runs.attrs.get("problems", [])]
    matrices = sections.matrices(table, by_id, problems)
    rows = [
        _row(row, columns) | _behind([by_id[i] for i in dict.fromkeys(row["ids"])], shown, settings, problems)
        for row in table.to_dict("records")
    ]
    return {
        "title": title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "counts": {status: int((runs["status"] == status).sum()) for status in STATUSES},
        "problems": [[str(part) for part in problem] for problem in problems],
        "columns": [_column(name) for name in columns],
        "costs": shown,
        "main": [c for c in MAIN_COSTS if c in columns],
        "rows": rows,
        "matrices": matrices,
        "overviews": sections.overviews(runs),
        "budgets": sections.budgets(table),
        "absent": [_absent(run) for run in runs[runs["status"] != "ok"].to_dict("records")],
        "data": _distinct(runs, ["task", *(f"data_{fact}" for fact in _DATA_FACTS), "data_fingerprint"]),
        "environment": _distinct(runs, ["model", "config_model_path", "config_model_revision", *_ENVIRONMENT]),
    }


_ENVIRONMENT = (
    "device",
    "cpu",
    "memory_kind",
    "software",
    "environment_commit",
    "environment_python",
    "environment_os",
)


def views(table: pd.DataFrame) -> pd.Series:
    """For each row the number, within its task and model, of the set of rows that it may be compared with."""
    view = pd.Series(0, index=table.index)
    for _, part in table.groupby(["task", "model"], dropna=False):
        if _comparable(part):
            continue
        sets: list[list[Any]] = []
        for index in part.index:
            home = next((i for i, rows in enumerate(sets) if _comparable(table.loc[[*rows, index]])), len(sets))
            sets[home:] = [[*sets[home], index], *sets[home + 1 :]] if home < len(sets) else [[index]]
            view[index] = home
    return view


def _comparable(rows: pd.DataFrame) -> bool:
    try:
        refuse_mixed(rows.drop(columns="software"), "time")  # the strictest: the page also shows times
    except Mixed:
        return False
    return True


def _part(name: str) -> str:
    return files("analysis").joinpath(name).read_text(encoding="utf-8")


def _column(name: str) -> dict[str, Any]:
    column = COSTS.get(name, Column(name.removeprefix(METRICS), ""))
    title = "Score (headline metric, test)" if name == "score" else column.title
    return {"key": name, "title": title, "unit": column.unit, "score": is_score(name)}


def _row(row: dict[Any, Any], columns: list[str]) -> dict[str, Any]:
    facts = (
        "task",
        "model",
        "method",
        "label",
        "metric",
        "protocol",
        "device",
        "cpu",
        "memory_kind",
        "software",
        "experiment",
    )
    values = {c: [number(row[f"{c}{end}"]) for end in ("", "_sd", "_low", "_high")] for c in columns}
    counts = {"n": int(row["n"]), "missing": int(row["missing"]), "view": int(row["view"])}
    return (
        {f: _cell(row.get(f)) for f in facts}
        | counts
        | {"picked": bool(row["picked"]), "standin": bool(row["data_standin"]), "values": values}
    )


def _settings(runs: pd.DataFrame) -> list[str]:
    """The columns of settings worth showing: the method's own, and those that differ between runs."""
    ignored = ("config_seed", "config_results", "config_name", "config_device", "config_wandb")
    found = [c for c in runs.columns if c.startswith("config_") and not c.startswith(ignored)]
    return [c for c in found if c.startswith("config_method") or runs[c].nunique(dropna=False) > 1]


def _behind(
    runs: list[dict[Any, Any]], costs: list[str], settings: list[str], problems: list[tuple[str, str]]
) -> dict[str, Any]:
    """What stands behind one row: each finished run's id, seed, score and costs; the settings, curves and spectra."""
    done = sections.finished(runs)
    each = [[_cell(run["id"]), _cell(run["seed"]), *(number(run[c]) for c in ("score", *costs))] for run in done]
    known = {c.removeprefix("config_"): _cell(runs[0][c]) for c in settings if _cell(runs[0][c])}
    weights = {"spectra": sections.spectra(done), "layers": sections.layers(done, problems)}
    lost = {"forgetting": sections.forgetting(done), "sweep": sections.sweep(done, problems)}
    return {"runs": each, "settings": known, "curves": sections.curves(done)} | weights | lost


def _absent(run: dict[Any, Any]) -> dict[str, str]:
    return {key: _cell(run.get(key)) for key in ("task", "model", "method", "seed", "status", "reason")}


def _distinct(runs: pd.DataFrame, names: list[str]) -> dict[str, Any]:
    """The different rows of some columns, without the columns that nothing is known of."""
    known = [name for name in names if name in runs and runs[name].notna().any()]
    rows = runs[known].astype(object).drop_duplicates()
    heads = [name.removeprefix("data_").removeprefix("config_").removeprefix("environment_") for name in known]
    return {"heads": [h.replace("_", " ") for h in heads], "rows": [[_cell(v) for v in row] for row in rows.to_numpy()]}


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
