"""Figures of methods over tasks: critical-difference diagram, heat map, performance profile. Tables in, axes out.

Colours: Okabe and Ito 2008, told apart by all kinds of colour vision; lines also differ in dash and end in their name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
STANDIN = "generated stand-in data, no result"


def styles(names: Any) -> dict[Any, dict[str, Any]]:
    """A colour and a dash for each name, in their order: 28 different ones before any repeats."""
    number = len(COLOURS)
    pairs = {n: (COLOURS[i % number], DASHES[(i // number) % len(DASHES)]) for i, n in enumerate(names)}
    return {name: {"color": colour, "linestyle": dash} for name, (colour, dash) in pairs.items()}


def critical_difference(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The diagram of Demšar 2006 from `ranks.critical_difference`: mean ranks on a line, best at the left.

    A bar joins methods of whom no pair can be told apart. The critical difference is drawn where the test has one.
    """
    import matplotlib.pyplot as plt

    k, bars = len(table), table.attrs["bars"]
    sides = (k + 1) // 2
    top, deep = 1.0, 0.55 + 0.32 * len(bars) + 0.42 * sides
    ax = plt.subplots(figsize=(7.5, 0.5 + 0.4 * (top + deep)), layout="constrained")[1] if ax is None else ax
    low, high = 1, k
    ax.hlines(0, low, high, color="black", linewidth=1.2)
    for tick in range(low, high + 1):
        ax.vlines(tick, 0, 0.14, color="black", linewidth=0.9)
        ax.text(tick, 0.22, str(tick), ha="center", va="bottom", fontsize=8)
    for i, (first, last) in enumerate(bars):
        x0, x1 = table["mean_rank"].iloc[first], table["mean_rank"].iloc[last]
        ax.hlines(
            -0.3 - 0.32 * i, x0 - 0.006 * (k - 1), x1 + 0.006 * (k - 1), color=COLOURS[0], linewidth=4, capstyle="round"
        )
    _names(ax, table, sides, start=-0.55 - 0.32 * len(bars))
    if table.attrs["cd"] is not None:
        ax.plot([low, low + table.attrs["cd"]], [0.95, 0.95], color="black", linewidth=1.2, marker="|", markersize=7)
        ax.text(
            low + table.attrs["cd"] + 0.15,
            0.95,
            f"critical difference {table.attrs['cd']:.2f}",
            fontsize=8,
            va="center",
        )
    ax.set(xlim=(low - 0.36 * (k - 1), high + 0.36 * (k - 1)), ylim=(-deep - 0.2, 1.3))
    test = {"nemenyi": "Nemenyi", "wilcoxon": "Wilcoxon with Holm"}[table.attrs["test"]]
    title = f"Mean ranks over {table.attrs['tasks']} tasks, 1 is best; bars: not told apart ({test}, 5 %)"
    ax.set_title(title + (f"\n{STANDIN}" if table.attrs.get("standin") else ""), fontsize=10)
    ax.axis("off")
    return ax


def _names(ax: Axes, table: pd.DataFrame, sides: int, start: float) -> None:
    """The better half at the left, best on top; the other half at the right, worst on top."""
    k = len(table)
    for i, (name, rank) in enumerate(zip(table["method"], table["mean_rank"], strict=True)):
        left = i < sides
        level = start - 0.42 * (i if left else k - 1 - i)
        edge = 1 - 0.03 * (k - 1) if left else k + 0.03 * (k - 1)
        ax.plot([rank, rank, edge], [0, level, level], color="0.35", linewidth=0.8)
        side: Any = {"ha": "right" if left else "left", "va": "center", "fontsize": 8.5}
        gap = -0.08 if left else 0.08
        ax.text(edge + gap, level, f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}", **side)


def heat_map(scores: pd.DataFrame, ax: Axes | None = None, *, reference: str | None = None) -> Axes:
    """(tasks, methods) scores of `ranks.by_task` as a map, in points (× 100): each number written, colour by difference.

    Colour is the difference to the task's mean over methods, or to the column `reference`; blue above, orange below, so that
    tasks of different difficulty share a scale. The scale ends at the 95th percentile of the differences.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    if reference is not None and reference not in scores:
        raise ValueError(f"reference {reference!r} is no method of the table: {', '.join(map(str, scores.columns))}")
    base = scores.mean(axis=1) if reference is None else scores[reference]
    gap = 100 * scores.sub(base, axis=0)
    size = (1.8 + 0.58 * scores.shape[1], max(1.4 + 0.27 * len(scores), 2.8))
    ax = plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
    limit = float(np.quantile(gap.abs(), 0.95)) or 1.0
    colours = LinearSegmentedColormap.from_list("below, above", ["#B34700", "#F4A582", "#F7F7F7", "#92C5DE", "#005A8F"])
    shades = gap.to_numpy(float)
    image = ax.imshow(shades, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(100 * scores.to_numpy()):
        dark = abs(shades[i, j]) > 0.75 * limit
        ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    ax.set_xticks(range(scores.shape[1]), scores.columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    ax.set_yticks(range(len(scores)), [_block(index) for index in scores.index], fontsize=8.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(STANDIN if scores.attrs.get("standin") else "", fontsize=10)
    bar = ax.figure.colorbar(image, ax=ax, extend="both", pad=0.02, aspect=30)
    bar.set_label(f"points from {reference or 'row mean'}", fontsize=8.5)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return ax


def _block(index: Any) -> str:
    """The task alone; tables of one model need not repeat it."""
    return str(index[0]) if isinstance(index, tuple) else str(index)


def profile(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Performance profiles of `aggregate.profile`: the share of runs above each score; bands where there are intervals."""
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(7, 4.2), layout="constrained")[1] if ax is None else ax
    for name, style in styles(dict.fromkeys(table["method"])).items():
        own = table[table["method"] == name]
        ax.step(own["threshold"], own["share"], where="post", label=name, linewidth=1.6, **style)
        if own["low"].notna().all():
            ax.fill_between(
                own["threshold"], own["low"], own["high"], step="post", color=style["color"], alpha=0.15, lw=0
            )
    ax.set(xlabel="score τ", ylabel="share of task × seed runs above τ", ylim=(-0.02, 1.02))
    ax.set_title(STANDIN if table.attrs.get("standin") else "", fontsize=10)
    ax.margins(x=0)
    legend(ax, table["method"].nunique())
    return ax


def legend(ax: Axes, number: int) -> None:
    """Names beside the plot where they are many, else inside."""
    place: Any = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if number > 5 else {"loc": "best"}
    ax.legend(fontsize=8, frameon=False, handlelength=2.8, **place)
    ax.spines[["top", "right"]].set_visible(False)
