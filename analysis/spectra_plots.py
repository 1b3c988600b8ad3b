"""Figures of spectra: each function takes a table first and returns the axes that it drew on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.spectra import EPSILON, K

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKS = "osD^vPX"
_KINDS = ("query", "key", "value", "attention_output", "mlp_input", "mlp_output")


def similarity(table: pd.DataFrame, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Heat map of absolute cosines, pretrained vectors against tuned ones (`analysis.spectra.similarity`).

    A dark diagonal: the spectrum was kept. A pale column: a vector that is like none of these, so maybe an intruder.
    """
    ax = axes(ax, 5.4, 4.4)
    k = len(table)
    image = ax.imshow(table.to_numpy(float), cmap="Blues", vmin=0, vmax=1)
    places = list(range(k) if k <= 12 else range(4, k, 5))
    ax.set_xticks(places, [str(table.columns[i]) for i in places])
    ax.set_yticks(places, [str(table.index[i]) for i in places])
    ax.set(xlabel="Tuned singular vector", ylabel="Pretrained singular vector")
    ax.set_title(title, fontsize=11)
    ax.figure.colorbar(image, ax=ax, label="|cosine|")
    return ax


def counts(table: pd.DataFrame, ax: Axes | None = None, *, floor: float | None = None, k: int = K) -> Axes:
    """Intruders over epsilon, a line per method (`analysis.spectra_runs.curves`); the span of its runs as a band.

    floor: the similarity of a random vector (`headline`'s `floor`), below which nothing can be counted.
    """
    ax = axes(ax, 6.4, 4.2)
    for i, (name, part) in enumerate(table.groupby("method", sort=False)):
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
        part = part.sort_values("epsilon")
        ax.plot(
            part["epsilon"],
            part["intruders"],
            color=colour,
            marker=mark,
            markevery=2,
            ms=5,
            lw=1.5,
            label=str(name),
            clip_on=False,
        )
        if "low" in part and part["n"].max() > 1:
            ax.fill_between(part["epsilon"], part["low"], part["high"], color=colour, alpha=0.18, linewidth=0)
    ax.axvline(EPSILON, color="0.6", lw=0.8, ls="--", zorder=0)
    if floor is not None:
        ax.axvspan(0, floor, color="0.92", zorder=0)
        ax.text(
            floor / 2,
            0.5,
            "random vectors",
            rotation=90,
            ha="center",
            va="center",
            fontsize=8,
            color="0.4",
            transform=ax.get_xaxis_transform(),
        )
    ax.set(xlabel="Threshold ε", ylabel="Intruder dimensions", xlim=(0, 1))
    ax.set_title(f"Top {k} of each matrix, sum over matrices", fontsize=11)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(floor or 0, 1))
    return ax


def layers(table: pd.DataFrame, value: str = "intruders", ax: Axes | None = None, *, title: str = "") -> Axes:
    """A map of layers and kinds of matrix (`analysis.spectra_model.participation`): `intruders`, or `share` of the change.

    Cells without a matrix stay empty; each of the others shows its number.
    """
    grid = table.pivot_table(index="layer", columns="kind", values=value, aggfunc="sum")
    grid = grid[[*(c for c in _KINDS if c in grid), *(c for c in grid if c not in _KINDS)]]
    numbers = grid.to_numpy(float)
    ax = axes(ax, 2.0 + 0.8 * grid.shape[1], 1.6 + 0.34 * len(grid))
    most = np.nanmax(numbers) if np.isfinite(numbers).any() else 1
    image = ax.imshow(numbers, cmap="Blues", vmin=0, vmax=most or 1, aspect="auto")
    for (i, j), number in np.ndenumerate(numbers):
        if np.isfinite(number):
            text = f"{number:.0%}" if value == "share" else f"{number:.0f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if number > 0.6 * most else "0.2")
    ax.set_xticks(range(grid.shape[1]), [str(c).replace("_", "\n") for c in grid], fontsize=8)
    ax.set_yticks(range(len(grid)), [str(i) for i in grid.index], fontsize=8)
    ax.set_ylabel("Layer")
    ax.set_title(
        title or {"share": "Share of the squared change", "intruders": "Intruder dimensions"}.get(value, value),
        fontsize=11,
    )
    ax.tick_params(length=0)
    style = "{x:.0%}" if value == "share" else "{x:g}"
    ax.figure.colorbar(image, ax=ax, fraction=0.046, format=style).ax.tick_params(labelsize=8)
    return ax


def singular_values(row: pd.Series, ax: Axes | None = None, *, epsilon: float = EPSILON) -> Axes:
    """The leading singular values of one matrix before and after (a row of `spectra`); intruders are ringed."""
    ax = axes(ax, 5.6, 3.8)
    x = np.arange(1, len(row["sigma_after"]) + 1)
    ax.plot(x, row["sigma_before"], color=COLOURS[0], marker="o", mfc="none", ms=5, lw=1.2, label="pretrained")
    ax.plot(x, row["sigma_after"], color=COLOURS[1], marker="s", ms=4, lw=1.2, label="tuned")
    foreign = np.asarray(row["cos_left"]) < epsilon
    after = np.asarray(row["sigma_after"])
    if foreign.any():
        ring = f"intruder (|cosine| < {epsilon:g})"
        ax.scatter(
            x[foreign], after[foreign], s=130, facecolors="none", edgecolors="0.1", linewidths=1.2, label=ring, zorder=3
        )
    ax.set(xlabel="Index", ylabel="Singular value")
    ax.set_title(str(row.get("name", "")), fontsize=11)
    ax.set_ylim(bottom=0)
    ax.set_xticks(x if len(x) <= 12 else x[4::5])
    ax.legend(fontsize=8, frameon=False)
    return ax


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """`ax`, or those of a new figure of this size in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax
