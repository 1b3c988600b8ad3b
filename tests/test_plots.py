"""The figures show the numbers of their tables."""

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis import aggregate, plots_runs, plots_tests, ranks, tuning
from tests.test_analysis import frame, synthetic, write_grid
from tests.test_imports import peft_file, write_peft

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture
def scores():
    values = np.random.default_rng(0).normal(size=(12, 5)) / 10 + [0.5, 0.5, 0.5, 0.9, 0.1]
    return pd.DataFrame(values, columns=["lora", "dora", "vera", "full", "linear"])


def drawn(ax):
    ax.figure.canvas.draw()
    return [t.get_text() for t in ax.texts]


@pytest.mark.parametrize("test", ["nemenyi", "wilcoxon"])
def test_critical_difference_diagram(scores, test):
    table = ranks.critical_difference(scores, test)
    ax = plots_tests.critical_difference(table)
    texts = drawn(ax)
    for name, rank in zip(table["method"], table["mean_rank"], strict=True):
        assert f"{name}  {rank:.2f}" in texts or f"{rank:.2f}  {name}" in texts
    thick = [c for c in ax.collections if c.get_linewidth()[0] == 4]
    assert len(thick) == len(table.attrs["bars"]) > 0 and any("4.1" in t or "critical" in t for t in texts) == (
        test == "nemenyi"
    )
    lengths = sorted(np.ptp(c.get_segments()[0][:, 0]) for c in thick)
    spans = sorted(table["mean_rank"].iloc[b] - table["mean_rank"].iloc[a] for a, b in table.attrs["bars"])
    np.testing.assert_allclose(lengths, spans, atol=0.06)


def test_stand_in_is_said_in_every_figure():
    runs = frame(
        *(synthetic(m, t, s, standin=True) for m in ("a", "b", "c") for t in ("rte", "stsb", "sst2") for s in (0, 1))
    )
    scores = ranks.by_task(runs)
    figures = [plots_tests.heat_map(scores), plots_tests.critical_difference(ranks.critical_difference(scores))]
    figures += [plots_tests.profile(aggregate.profile(runs, draws=10))]
    assert all("no result" in ax.get_title() for ax in figures)
    one = runs[runs["task"] == "rte (stand-in)"].drop(columns="path")
    curves = plots_runs.learning(one.assign(step=1, value=0.5)[["method", "task", "seed", "step", "value"]])
    assert "stand-in" in curves.get_title()


def test_heat_map_writes_every_score(scores):
    ax = plots_tests.heat_map(scores, reference="lora")
    assert drawn(ax) == [f"{100 * v:.1f}" for v in scores.to_numpy().ravel()]
    assert (ax.images[0].get_array()[:, 0] == 0).all() and ax.images[0].get_clim()[0] == -ax.images[0].get_clim()[1]
    with pytest.raises(ValueError, match="reference 'x' is no method"):
        plots_tests.heat_map(scores, reference="x")


def test_profile_bands_and_styles(tmp_path):
    runs = analysis.load(write_grid(tmp_path, seeds=2))
    ax = plots_tests.profile(aggregate.profile(runs, draws=20))
    assert len(ax.lines) == 6 == len(ax.collections)
    looks = plots_tests.styles(range(28))
    assert len({str(sorted(s.items(), key=str)) for s in looks.values()}) == 28


def test_tuning_curve_and_its_band():
    trials = pd.DataFrame(
        {"method": ["a"] * 4 + ["b"] * 8, "task": "t", "val": np.arange(12) / 12, "score": np.arange(12) / 24}
    )
    table = tuning.curve(trials, draws=20)
    ax = plots_runs.tuning(table)
    assert [len(line.get_xdata()) for line in ax.lines] == [4, 8] and len(ax.collections) == 2
    assert ax.lines[1].get_ydata()[-1] == pytest.approx(11 / 24)
    with pytest.raises(ValueError, match="no such numbers"):
        plots_runs.tuning(table.drop(columns="test"))


def test_learning_curves_come_from_the_records(tmp_path):
    runs = analysis.load(write_grid(tmp_path / "own", tasks=("rte",), methods=("lora", "full"), seeds=2))
    table = plots_runs.histories(runs)
    assert len(table) == 2 * 2 * 10 and table.query("method == 'lora' and step == 3")["value"].tolist() == [0.25, 0.25]
    assert len(plots_runs.learning(table).lines) == 2
    with pytest.raises(ValueError, match="no run has 'x' in its history; there are loss, val"):
        plots_runs.histories(runs, "x")
    peft = analysis.load(write_peft(tmp_path / "peft", a=peft_file()))
    assert plots_runs.histories(peft, "valid accuracy")["value"].tolist() == [0.3, 0.4]


def test_an_allocators_rank_is_a_curve_and_log_ticks_stay_apart(tmp_path):
    history = [{"step": float(s), "loss": 4 / (1 + s), "rank": 64.0 - 8 * s} for s in range(6)]
    synthetic("adalora", history=history).save(tmp_path)
    synthetic("lora", history=[{"step": 0.0, "loss": 1.0}]).save(tmp_path)
    runs = analysis.load(tmp_path)
    ax = plots_runs.learning(plots_runs.histories(runs, "rank"), title="total rank")
    assert ax.lines[0].get_ydata().tolist() == [64, 56, 48, 40, 32, 24] and len(ax.lines) == 1
    ax = plots_runs.learning(plots_runs.histories(runs))
    drawn(ax)
    renderer = ax.figure.canvas.get_renderer()
    labels = [t.get_window_extent(renderer) for t in ax.yaxis.get_ticklabels(which="both") if t.get_text()]
    assert ax.get_yscale() == "log" and len(labels) > 2
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])


def test_bars_stack_to_the_sum_and_say_stand_in():
    parts = {"weights": 5e8, "gradients": 1e6, "optimizer": 2e6, "activations": 9e7, "peak": 6e8}
    seconds = {"setup": 1.0, "train": 60.0, "eval": 5.0, "total": 70.0}
    record = synthetic("lora", standin=True, memory=parts, time=seconds)
    table = analysis.summarise(frame(record))
    ax = plots_runs.memory(table)
    ends = [b.get_x() + b.get_width() for b in ax.patches]
    assert max(ends) == pytest.approx(5e8 + 3e6 + 9e7) and len(ends) == 4 and ax.lines[0].get_xdata()[0] == 6e8
    assert "no result" in ax.get_title() and [t.get_text() for t in ax.get_yticklabels()] == ["lora"]
    ends = [b.get_x() + b.get_width() for b in plots_runs.time(table).patches]
    assert max(ends) == 70 and len(ends) == 4, "what is left of the total is a part of its own"
    with pytest.raises(ValueError, match="nothing to draw"):
        plots_runs.memory(table.drop(columns=[*plots_runs.MEMORY]))
