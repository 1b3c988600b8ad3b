"""Names beside marks, in the figures and on the page: on no mark, bar, stair, leader or other name."""

import itertools
import json
import re

import numpy as np
import pytest

import analysis
from analysis.placement import leader, overlaps, place
from analysis.report import report
from tests.test_analysis import synthetic
from tests.test_report import browser, visit

plt = pytest.importorskip("matplotlib.pyplot")
COUNTS = (5, 15, 40)


def many(folder, n):
    """n methods of three seeds; the first has no parameters of its own."""
    random = np.random.default_rng(1)
    for i in range(n):
        params = int(10 ** random.uniform(4, 8)) if i else 0
        base = 0.6 + 0.02 * np.log10(1 + params) + 0.03 * random.normal()
        for seed in range(3):
            score = base + 0.008 * random.normal()
            synthetic(f"method_{i}", "rte", seed, trained_params=params, score=score).save(folder)
    return analysis.load(folder)


@pytest.fixture(scope="module")
def crowds(tmp_path_factory):
    return {n: many(tmp_path_factory.mktemp(f"crowd{n}"), n) for n in COUNTS}


def test_a_leader_is_a_chain_without_gaps_from_the_mark_to_the_name():
    parts = leader(np.array([0.0, 0.0]), (60, 80, 100, 90))
    assert len(parts) > 20 and not overlaps((-4, -4, 4, 4), parts) and overlaps((60, 80, 61, 81), parts)
    assert all(overlaps(a, [b]) for a, b in itertools.pairwise(parts))
    assert leader(np.array([0.0, 0.0]), (5, 5, 40, 15)) == [], "near: no line"


def test_those_without_room_choose_first_in_the_next_try(monkeypatch):
    random = np.random.default_rng(0)
    points, sizes = random.uniform(40, 360, (45, 2)), np.full((45, 2), [60.0, 12.0])
    tried = [sum(box is not None for box in place(points, sizes, (0, 0, 400, 400)))]
    monkeypatch.setattr("analysis.placement._TRIES", 1)
    assert sum(box is not None for box in place(points, sizes, (0, 0, 400, 400))) < tried[0]


@pytest.mark.parametrize("cost", ["trained_params", "memory_peak"])
@pytest.mark.parametrize("dpi", [100, 220])
@pytest.mark.parametrize("n", COUNTS)
def test_names_of_a_figure_stand_free(crowds, n, dpi, cost):
    from matplotlib.text import Text  # without the leader line that an annotation's own extent includes

    plt.switch_backend("agg")
    ax = analysis.plots.pareto(
        analysis.summarise(crowds[n]), cost, plt.subplots(figsize=(7, 4.6), dpi=dpi, layout="constrained")[1]
    )
    ax.figure.canvas.draw()
    names = {t.get_text(): Text.get_window_extent(t).extents for t in ax.texts if t.get_text().startswith("method_")}
    assert not any(overlaps(a, [b]) for a, b in itertools.combinations(names.values(), 2))
    bars = [ax.transData.transform(bar) for lines in ax.collections for bar in lines.get_segments()]
    assert len(bars) >= n, "the bars of the scores are drawn"
    assert not any(overlaps(box, [(*b.min(0), *b.max(0))]) for box in names.values() for b in bars)
    marks = np.concatenate([ax.transData.transform(li.get_xydata()) for li in ax.lines if li.get_marker() == "o"])
    assert len(marks) == n
    assert not any(overlaps(box, np.hstack([marks - 3, marks + 3])) for box in names.values())
    said = re.search(r"(\d+) of (\d+) named", ax.get_xlabel())
    assert (said is None) == (len(names) == n) and (n > 15 or said is None)
    if said:
        front = analysis.pareto(analysis.summarise(crowds[n]), cost).query("front == True")["method"]
        assert [int(s) for s in said.groups()] == [len(names), n] and set(names) & set(front)
    plt.close(ax.figure)


PROBE = """
const box = e => { const b = e.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; }, all = s => [...document.querySelectorAll("#plot svg " + s)];
const ends = e => ["x1", "y1", "x2", "y2"].map(k => Number(e.getAttribute(k)));
const seen = { names: all(".name").map(box), bars: all(".bar").map(ends), leaders: all(".leader").map(ends), marks: all(".point").map(box),
  texts: all(".name").map(e => e.textContent), ticks: all(".tick").map(box), width: byId("plot").querySelector("svg").viewBox.baseVal.width,
  said: all(".said").map(e => e.textContent).join() };
document.body.replaceChildren(el("pre", { id: "seen" }, JSON.stringify(seen)));
"""


def crosses(box, line):
    """Whether a line (x1, y1, x2, y2) runs through the inside of a box, looked at in 200 places."""
    x, y = np.linspace(line[:2], line[2:], 200).T
    return bool(((box[0] < x) & (x < box[2]) & (box[1] < y) & (y < box[3])).any())


@browser
@pytest.mark.parametrize("n", COUNTS)
def test_names_of_the_page_stand_free(crowds, n, tmp_path):
    page, wide = report(crowds[n], tmp_path / "r.html"), tmp_path / "wide.html"
    wide.write_text(page.read_text().replace("</script>\n</body>", f"{PROBE}</script>\n</body>"))
    for state, narrow in (("#cost=trained_params", False), ("#cost=memory_peak&theme=dark", False), ("", True)):
        if narrow:
            wide.write_text(wide.read_text().replace("<style>", "<style>body { width: 390px; }", 1))
        dom = visit(wide, tmp_path / "profile", state)
        seen = json.loads(re.search('<pre id="seen">(.*)</pre>', dom, re.S).group(1))
        names, lines = seen["names"], seen["bars"]
        assert not any(overlaps(a, [b]) for a, b in itertools.combinations(names, 2)) and len(names) >= min(n, 3)
        assert len(lines) >= n and not [b for a in names for b in lines if crosses(a, b)]
        assert not any(overlaps(a, seen["marks"]) for a in names) and len(seen["marks"]) == n
        inner = [[a[0] + 1, a[1] + 1, a[2] - 1, a[3] - 1] for a in names]  # a leader ends at the edge of its name
        assert not [b for a in inner for b in seen["leaders"] if crosses(a, b)]
        assert max(t[2] for t in seen["ticks"]) <= seen["width"] + 0.5, "no number is cut off at the right"
        assert seen["said"] == ("" if len(names) == n else f"{len(names)} of {n} named; hover for the rest")
