"""From a folder of records to tables, fronts, plots and one HTML report. Statistics return tables; plots take them.

runs = analysis.load("results")
table = analysis.summarise(runs)
analysis.plots.pareto(table[table.task == "rte"])
analysis.paired.compare(runs, "lora", "dora")                    # on stored predictions
analysis.ranks.critical_difference(analysis.ranks.by_task(runs))  # over tasks
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis import aggregate as aggregate
    from analysis import composite as composite
    from analysis import front_chance as front_chance
    from analysis import paired as paired
    from analysis import plots as plots
    from analysis import plots_runs as plots_runs
    from analysis import plots_tests as plots_tests
    from analysis import power as power
    from analysis import ranks as ranks
    from analysis import report as report
    from analysis import tuning as tuning
    from analysis.fronts import Mixed as Mixed
    from analysis.fronts import pareto as pareto
    from analysis.imports import peft_results as peft_results
    from analysis.imports import vtab_grids as vtab_grids
    from analysis.imports import vtab_selected as vtab_selected
    from analysis.runs import NoRuns as NoRuns
    from analysis.runs import load as load
    from analysis.suites import suite_average as suite_average
    from analysis.summary import summarise as summarise

_HOME = {"load": "runs", "NoRuns": "runs", "summarise": "summary", "pareto": "fronts", "Mixed": "fronts"}
_HOME |= {"suite_average": "suites"}
_HOME |= dict.fromkeys(("peft_results", "vtab_selected", "vtab_grids"), "imports")
_MODULES = (
    "aggregate",
    "composite",
    "front_chance",
    "paired",
    "plots",
    "plots_runs",
    "plots_tests",
    "power",
    "ranks",
    "report",
    "tuning",
)
__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    """Import on first use: `python -m analysis --help` needs no pandas, a table needs no matplotlib."""
    if name in _MODULES:
        return importlib.import_module(f"analysis.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"analysis.{_HOME[name]}"), name)
    raise AttributeError(f"module 'analysis' has no attribute {name!r}; it has {', '.join(__all__)}")
