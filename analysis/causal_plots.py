"""Figures about cause and time of intruders: lambda sweep, forgetting, rank, training, stages; a table first, axes returned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.spectra_plots import COLOURS, MARKS, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def lambdas(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "score") -> Axes:
    """Change of `score` or `forgetting` against lambda = 1, intruder beside neighbour (`analysis.causal.sweep`).

    Of several runs the mean, and their span as a band.
    """
    from analysis.causal import changes

    ax = axes(ax, 5.8, 4.0)
    for vector, part in changes(table, value).groupby("vector"):
        colour, mark = (COLOURS[1], "s") if vector == "intruder" else (COLOURS[0], "o")
        ax.plot(part["lambda"], part["mean"], color=colour, marker=mark, ms=5, lw=1.5, label=str(vector))
        ax.fill_between(part["lambda"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
    ax.axvline(1, color="0.6", lw=0.8, ls="--", zorder=0)
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    ax.set(xlabel="Factor λ on one singular vector of each matrix", ylabel=f"Change of {value} against λ = 1")
    if "task" in table:
        ax.set_title(", ".join(dict.fromkeys(table["task"])), fontsize=11)
    ax.legend(fontsize=8, frameon=False)
    return ax


def against(
    runs: pd.DataFrame, x: str = "spectra_intruders", y: str = "forgetting_forgetting", ax: Axes | None = None
) -> Axes:
    """One mark per run, a colour and mark per method; Spearman's correlation in the title (`analysis.load`).

    Runs without either number are left out. Intruders against forgetting, or with x="config_method_rank",
    y="spectra_intruders" against rank, whose axis is logarithmic.
    """
    ax = axes(ax, 5.8, 4.2)
    found = runs.dropna(subset=[x, y]).astype({x: float, y: float})
    if found.empty:
        raise ValueError(f"no run has both {x} and {y}: python -m analysis spectra and forgetting write them")
    for i, (name, part) in enumerate(found.groupby(found["label"] if "label" in found else found["method"])):
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
        ax.scatter(part[x], part[y], color=colour, marker=mark, s=30, alpha=0.8, label=str(name), linewidths=0)
    if x.endswith("rank"):
        ax.set_xscale("log", base=2)
    rho = float(found[x].corr(found[y], method="spearman"))
    title = f"Spearman {rho:.2f}" if np.isfinite(rho) else "no correlation: one of the two is constant"
    ax.set_title(f"{title}, {len(found)} runs", fontsize=11)
    ax.set(xlabel=_words(x), ylabel=_words(y))
    ax.legend(fontsize=8, frameon=False)
    return ax


def dynamics(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Intruders over optimizer steps, a line per run (`analysis.dynamics.births`, with a column `run` where several)."""
    ax = axes(ax, 5.8, 3.8)
    for i, (name, part) in enumerate((table if "run" in table else table.assign(run="")).groupby("run", sort=False)):
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
        ax.plot(part["step"], part["intruders"], color=colour, marker=mark, ms=5, lw=1.5, label=str(name))
    ax.set(xlabel="Optimizer step", ylabel="Intruder dimensions")
    ax.set_ylim(bottom=0)
    if ax.get_legend_handles_labels()[1] != [""]:
        ax.legend(fontsize=8, frameon=False)
    return ax


def life(table: pd.DataFrame, ax: Axes | None = None, *, title: str = "") -> Axes:
    """One intruder's cosine with the nearest pretrained vector and with itself at the look before (`analysis.dynamics.track`)."""
    ax = axes(ax, 5.8, 3.8)
    ax.plot(table["step"], table["cosine"], color=COLOURS[1], marker="s", ms=5, label="with the nearest pretrained")
    ax.plot(table["step"], table["turn"], color=COLOURS[0], marker="o", ms=5, label="with itself, one look before")
    ax.set(xlabel="Optimizer step", ylabel="|cosine|", ylim=(0, 1.02))
    ax.set_title(title, fontsize=11)
    ax.legend(fontsize=8, frameon=False)
    return ax


def stages(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Score of every task after each stage of a chain (`analysis.continual.chain`); a ring where it was the one trained."""
    ax = axes(ax, 5.8, 4.0)
    for i, (task, part) in enumerate(table.groupby("task", sort=False)):
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(part["stage"], part["score"], color=colour, marker=MARKS[i % len(MARKS)], ms=5, lw=1.5, label=str(task))
        own = part[part["trained"] == task]
        ax.scatter(own["stage"], own["score"], s=130, facecolors="none", edgecolors=colour, linewidths=1.2)
    names = table.drop_duplicates("stage")["trained"].fillna("pretrained")
    ax.set_xticks(range(len(names)), [str(n).replace("_", "\n") for n in names], fontsize=8)
    ax.set(xlabel="Trained last", ylabel="Test score, its head trained anew")
    ax.legend(fontsize=8, frameon=False)
    return ax


def _words(column: str) -> str:
    known = {"spectra_intruders": "Intruder dimensions", "forgetting_forgetting": "Forgetting"}
    return known.get(column, column.removeprefix("config_method_").removeprefix("spectra_").replace("_", " "))
