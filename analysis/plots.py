"""Figures of tables: each function takes a table first and returns the axes that it drew on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.columns import COSTS, METRICS, axis_title, write
from analysis.fronts import pareto as flag_front
from analysis.placement import LEADER, Box, distance, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAD, RADIUS = 2, 5.5  # 1/100 inch: room around a label, half of a mark
FRONT, OTHER = "#0072B2", "#8a6d3b"  # told apart by lightness and by a filled or hollow mark as well


def pareto(table: pd.DataFrame, cost: str = "trained_params", ax: Axes | None = None, *, score: str = "score") -> Axes:
    """Score against cost, one mark per row, the front as a stair, the interval over seeds as bars.

    The cost axis is logarithmic where costs span more than a decade; a cost of 0 then has its own place at the left.
    Rows without cost or score are counted below the plot. Refuses mixed tables as `analysis.pareto` does.
    """
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(7, 4.6), layout="constrained")[1] if ax is None else ax
    table = flag_front(table, cost, score)
    known = table[table["front"].notna()].sort_values([cost, score])
    if known.empty:
        raise ValueError(f"no row has both {cost!r} and {score!r}: nothing to draw ({len(table)} rows)")
    ax.margins(0.09, 0.12)
    _marks(ax, known, cost, score)
    _scale(ax, known[cost].to_numpy(float), cost)
    _write_titles(ax, table, cost, score)
    _label(ax, known, cost, score)
    return ax


def _scale(ax: Axes, costs: np.ndarray, cost: str) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    positive = costs[costs > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        smallest = 10.0 ** np.floor(np.log10(positive.min()))
        if (costs <= 0).any():
            ax.set_xscale("symlog", linthresh=smallest, linscale=0.6)
        else:
            ax.set_xscale("log")
    unit = COSTS[cost].unit if cost in COSTS else ""
    if unit == "bytes" and ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MultipleLocator(_binary_step(*ax.get_xlim())))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value, unit)))


def _binary_step(low: float, high: float) -> float:
    """A power of two that cuts the axis, whose bars may reach far beyond the marks, into 3 to 6 parts."""
    return float(2.0 ** np.ceil(np.log2((high - low) / 6)))


def _marks(ax: Axes, known: pd.DataFrame, cost: str, score: str) -> None:
    front = known["front"].to_numpy(bool)
    x, y = known[cost].to_numpy(float), known[score].to_numpy(float)
    for chosen, colour, name in ((~front, OTHER, "dominated"), (front, FRONT, "Pareto front")):
        bars: Any = {
            axis: _reach(known[chosen], column) for axis, column in (("xerr", cost), ("yerr", score))
        }  # nothing is drawn where there is one seed
        face = colour if name == "Pareto front" else "none"
        ax.errorbar(x[chosen], y[chosen], **bars, fmt="o", color=colour, mfc=face, elinewidth=0.9, ms=6, label=name)
    ax.step(x[front], y[front], where="post", color=FRONT, linewidth=1.2, alpha=0.7)
    ax.legend(loc="lower right", fontsize=8)


def _reach(rows: pd.DataFrame, column: str) -> np.ndarray | None:
    """(2, n) distances to the interval's ends, NaN as 0; None where the table has no interval."""
    if f"{column}_low" not in rows:
        return None
    low, high = rows[column] - rows[f"{column}_low"], rows[f"{column}_high"] - rows[column]
    return np.nan_to_num(np.array([low, high], dtype=float)).clip(0)


def _write_titles(ax: Axes, table: pd.DataFrame, cost: str, score: str) -> None:
    ax.set_xlabel(axis_title(cost))
    metric = table["metric"].iloc[0] if score == "score" and "metric" in table else ""
    ax.set_ylabel(f"Test {metric}" if metric else score.removeprefix(METRICS))
    names = [str(table[c].iloc[0]) for c in ("task", "model") if c in table]
    standin = "data_standin" in table and bool(table["data_standin"].iloc[0])
    ax.set_title(" · ".join(names) + (": generated stand-in data, no result" if standin else ""), fontsize=11)
    if standin:
        middle: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "rotation": 25,
            "transform": ax.transAxes,
            "zorder": 0,
        }
        ax.text(0.5, 0.5, "STAND-IN DATA", fontsize=34, color="0.5", alpha=0.25, **middle)
    if absent := int(table["front"].isna().sum()):
        note: dict[str, Any] = {"xycoords": "axes fraction", "fontsize": 7, "color": "0.35", "va": "bottom"}
        ax.annotate(f"{absent} row(s) without cost or score are not drawn", (0.01, 0.01), **note)


def _label(ax: Axes, known: pd.DataFrame, cost: str, score: str) -> None:
    """Name the marks; where there is no room for all, only the front and the extremes, which the figure then says."""
    rows = known.sort_values("front", ascending=False, kind="stable")
    texts = [str(n) for n in (rows["label"] if "label" in rows else rows.get("method", rows.index))]
    points = rows[[cost, score]].to_numpy(float)
    places = _places(ax, texts, points, np.arange(len(rows)))
    if len(places) < len(rows):
        ends = (points.argmin(0), points.argmax(0))
        main = np.union1d(np.flatnonzero(rows["front"].to_numpy(bool)), np.ravel(ends))
        note = f"{ax.get_xlabel()}\n%d of {len(rows)} named, of the front and the extremes; the rest are in the table"
        ax.set_xlabel(note % len(main))  # takes room: the axes change before the labels are placed
        places = _places(ax, texts, points, main)
        ax.set_xlabel(note % len(places))
    for row, (point, box) in places.items():
        _annotate(ax, texts[row], point, box)


def _places(ax: Axes, texts: list[str], points: np.ndarray, rows: np.ndarray) -> dict[int, tuple[np.ndarray, Box]]:
    """Of those rows that found room: where the point and the label are, in 1/100 inch whatever the resolution."""
    figure, unit = ax.figure, ax.figure.dpi / 100
    figure.canvas.draw()
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels, legend = ax.transData.transform(points), ax.get_legend()
    others = np.delete(pixels, rows, axis=0)
    dots = np.concatenate([others - RADIUS * unit, others + RADIUS * unit], axis=1)
    blocked = [*dots, *_lines(ax), *([legend.get_window_extent(renderer).extents] if legend else [])]
    sizes = _sizes(ax, [texts[r] for r in rows], renderer) / unit + 2 * PAD
    bounds: Any = np.asarray(ax.bbox.extents) / unit
    found = place(pixels[rows] / unit, sizes, bounds, radius=RADIUS, blocked=np.reshape(blocked, (-1, 4)) / unit)
    return {int(r): (pixels[r] / unit, box) for r, box in zip(rows, found, strict=True) if box is not None}


def _sizes(ax: Axes, texts: list[str], renderer: Any) -> np.ndarray:
    """(n, 2) widths and heights of the labels in pixels."""
    drawn = [ax.annotate(text, (0, 0), xycoords="figure pixels", fontsize=8) for text in texts]
    extents = [text.get_window_extent(renderer) for text in drawn]
    for text in drawn:
        text.remove()
    return np.array([[e.width, e.height] for e in extents])


def _lines(ax: Axes) -> list[Box]:
    """The error bars and the parts of the stair, all of them upright or level, as thin boxes in pixels."""
    bars = [part for lines in ax.collections for part in lines.get_segments()]  # type: ignore[attr-defined]
    for line in (line for line in ax.lines if line.get_drawstyle() == "steps-post"):
        corners = np.repeat(line.get_xydata(), 2, axis=0)[1:, 0], np.repeat(line.get_xydata(), 2, axis=0)[:-1, 1]
        bars += [*np.stack([np.column_stack(corners)[:-1], np.column_stack(corners)[1:]], axis=1)]
    ends = [ax.transData.transform(bar) for bar in bars]
    return [(*(e.min(0) - 1.5), *(e.max(0) + 1.5)) for e in ends if len(e)]


def _annotate(ax: Axes, name: str, point: np.ndarray, box: Box) -> None:
    """Write a name into its box (1/100 inch), tied to the mark in data coordinates so that it moves with it."""
    from matplotlib.patheffects import withStroke

    offset = (0.72 * (box[0] + PAD - point[0]), 0.72 * (box[1] + PAD - point[1]))  # in 1/72 inch
    far = distance(box, point[None])[0] > LEADER
    arrow: Any = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if far else None
    data: Any = ax.transData.inverted().transform(point * ax.figure.dpi / 100)
    halo = withStroke(linewidth=2.5, foreground="white")
    style: Any = {"fontsize": 8, "ha": "left", "va": "bottom", "path_effects": [halo]}
    ax.annotate(name, data, offset, textcoords="offset points", arrowprops=arrow, annotation_clip=False, **style)
