"""Figures of runs: tuning curves, learning curves, and where memory and time go. Tables in, axes out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.columns import COSTS, write
from analysis.plots_tests import COLOURS, STANDIN, legend, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEMORY = ("memory_weights", "memory_gradients", "memory_optimizer", "memory_activations")
TIME = ("time_setup", "time_train", "time_eval", "time_generation")
HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def tuning(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "test") -> Axes:
    """Best-at-n-trials from `tuning.curve`: expected `value` ("test" or "val") against the number of trials, with bands."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    if value not in table or table[value].isna().all():
        raise ValueError(f"value={value!r}: the table has no such numbers; columns: {', '.join(table.columns)}")
    ax = plt.subplots(figsize=(7, 4.2), layout="constrained")[1] if ax is None else ax
    for name, style in styles(dict.fromkeys(table["method"])).items():
        own = table[table["method"] == name]
        ax.plot(own["n"], own[value], label=name, linewidth=1.6, marker="o", ms=3, **style)
        if f"{value}_low" in own and own[f"{value}_low"].notna().all():
            band = own[f"{value}_low"], own[f"{value}_high"]
            ax.fill_between(own["n"], *band, color=style["color"], alpha=0.13, lw=0)
    ax.set_xscale("log", base=2)
    ticks = [float(2**k) for k in range(12) if 2**k <= table["n"].max()]
    ax.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator(), major_formatter=ScalarFormatter())
    said = {"test": "expected test score of the trial that val chose", "val": "expected best val score"}
    ax.set(xlabel="trials", ylabel=said.get(value, value))
    legend(ax, table["method"].nunique())
    return ax


def histories(runs: pd.DataFrame, value: str = "loss") -> pd.DataFrame:
    """The learning curves of runs, from the files they came from: method, task, seed, step, value. A missing value is no row.

    `value` is a name in the history (records: "loss", "val/accuracy", ...; peft: "train loss", "valid accuracy").
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for run in runs.to_dict("records"):
        history = history_of(run["path"])
        facts = {name: run[name] for name in ("method", "task", "seed")}
        rows += [facts | {"step": h["step"], "value": h[value]} for h in history if h.get(value) is not None]
        seen |= {key for h in history for key in h}
    if not rows:
        raise ValueError(f"no run has {value!r} in its history; there are {', '.join(sorted(seen - {'step'}))}")
    return pd.DataFrame(rows)


def history_of(path: str | Path) -> list[dict[str, Any]]:
    """The learning curve in one result file, ours or peft's: [{"step": ..., "loss": ...}, ...]; empty where it has none.

    Empty too where the table came from a collected file and its runs are not beside it. A point without a finite step, and a value that is no finite number, are left out.
    """
    if Path(path).suffix != ".json" or not Path(path).exists():
        return []
    content = json.loads(Path(path).read_text())
    history = content.get("history", content.get("train_info", {}).get("metrics", []))
    points = [{k: v for k, v in p.items() if _finite(v)} for p in history if isinstance(p, dict)]
    return [point for point in points if "step" in point]


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def learning(table: pd.DataFrame, ax: Axes | None = None, *, title: str = "loss") -> Axes:
    """Learning curves of `histories`: the mean over seeds, with the range from the lowest to the highest seed as a band.

    Also ranks and budgets over time, of methods that change theirs: `learning(histories(runs, "rank"), title="total rank")`,
    or "active_params", "sparsity", ... (the `numbers` of a method lie in the history under these names).
    """
    import matplotlib.pyplot as plt

    if table["task"].nunique() > 1:
        raise ValueError(f"the curves are of several tasks: choose one of {', '.join(sorted(set(table['task'])))}")
    ax = plt.subplots(figsize=(7, 4.2), layout="constrained")[1] if ax is None else ax
    for name, style in styles(dict.fromkeys(table["method"])).items():
        at = table[table["method"] == name].groupby("step")["value"].agg(["mean", "min", "max"])
        ax.plot(at.index, at["mean"], label=name, linewidth=1.5, **style)
        if (at["max"] > at["min"]).any():
            ax.fill_between(at.index, at["min"], at["max"], color=style["color"], alpha=0.13, lw=0)
    if table["value"].min() > 0 and table["value"].max() > 5 * table["value"].min():
        from matplotlib.ticker import LogLocator, NullFormatter

        ax.set_yscale("log")  # one bad start would flatten all the others
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="step", ylabel=title)
    ax.set_title(str(table["task"].iloc[0]), fontsize=10)
    ax.margins(x=0.01)
    legend(ax, table["method"].nunique())
    return ax


def memory(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bytes by kind as one stacked bar per row of `summarise`; a mark at the measured peak.

    On a GPU the peak may lie above the sum (work space, cache of kernels) or below it (kinds that never coexist).
    """
    ax = _stacked(table, MEMORY, ax, "Memory of ")
    if "memory_peak" in table and table["memory_peak"].notna().any():
        places = range(len(table))
        ax.plot(table["memory_peak"], places, "|", color="black", ms=12, mew=2, label="peak")
    _finish(ax, table, "bytes", "memory (bytes)")
    return ax


def time(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Seconds by phase as one stacked bar per row of `summarise`; what else happened in the total as a last part."""
    parts = [c for c in TIME if c in table]
    rest = (table["time_total"] - table[parts].sum(axis=1)).clip(lower=0) if "time_total" in table else np.nan
    ax = _stacked(table.assign(time_rest=rest), (*TIME, "time_rest"), ax, "")
    _finish(ax, table, "s", "time (s)")
    return ax


def _stacked(table: pd.DataFrame, parts: Sequence[str], ax: Axes | None, prefix: str) -> Axes:
    import matplotlib.pyplot as plt

    known = [c for c in parts if c in table and table[c].notna().any() and (table[c] > 0).any()]
    if not known:
        raise ValueError(f"no row has any of {', '.join(parts)}: nothing to draw ({len(table)} rows)")
    size = (7.5, 1.3 + 0.34 * len(table))
    ax = plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
    start = np.zeros(len(table))
    for i, name in (
        (i, name) for i, name in enumerate(parts) if name in known
    ):  # a part keeps its colour in every plot
        width = table[name].fillna(0).to_numpy(float)
        title = (
            COSTS[name].title.removeprefix(prefix).removesuffix(" time") if name in COSTS else name.partition("_")[2]
        )
        look: Any = {"color": COLOURS[i], "hatch": HATCHES[i], "edgecolor": "white", "linewidth": 0.6}
        ax.barh(range(len(table)), width, left=start, height=0.68, label=title.lower(), **look)
        start += width
    return ax


def _finish(ax: Axes, table: pd.DataFrame, unit: str, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    names = table["label"] if "label" in table else table["method"]
    ax.set_yticks(range(len(table)), names, fontsize=9)
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(6))
    if unit == "bytes":
        from matplotlib.ticker import MultipleLocator

        ax.xaxis.set_major_locator(MultipleLocator(2.0 ** np.ceil(np.log2(ax.get_xlim()[1] / 7))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value, unit) if value else "0"))
    ax.set_xlabel(title)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(fontsize=8, frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
    if "data_standin" in table and table["data_standin"].any():
        ax.set_title(STANDIN, fontsize=10, pad=24)
