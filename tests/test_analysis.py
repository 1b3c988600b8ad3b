"""Reading records, means over seeds, fronts, labels and the command line of `analysis`, on synthetic records."""

import itertools
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis import findings
from analysis.columns import write
from analysis.defaults import complete
from analysis.fronts import Mixed
from analysis.placement import overlaps, place
from analysis.report import views
from bench.collect import collect
from bench.config import compose
from bench.record import Record
from bench.run import _new_record

METHODS = {"linear_probe": 0, "bitfit": 100_000, "ia3": 60_000, "lora": 300_000, "dora": 320_000, "full": 125_000_000}
SOFTWARE = {"torch": "2.13.0", "transformers": "5.23.0"}


def synthetic(method="lora", task="rte", seed=0, standin=False, lr=1e-3, **changes):
    """A record of invented numbers, drawn from its own arguments."""
    random = np.random.default_rng([len(method), sum(map(ord, method + task)), seed])
    params = METHODS.get(method, 200_000)
    score = 0.6 + 0.03 * math.log10(1 + params) + 0.02 * random.normal()
    peak = int(5e8 + 12 * params + 1e8 * random.random())
    values = dict(
        id=f"{abs(hash((method, task, seed, standin, lr))):016x}"[:12],
        method=method,
        model="roberta_base",
        task=f"{task} (stand-in)" if standin else task,
        seed=seed,
        config={"train": {"lr": lr, "epochs": 3.0}, "method": {"rank": 8, "targets": ["query", "value"]}, "seed": seed},
        data={"kind": "mirror", "path": "glue", "name": task, "revision": "abc", "standin": standin, "protocol": "cut-1",
              "rows": {"train": 2490, "val": 138, "test": 139}, "fingerprints": {"train": "aa", "val": "bb", "test": task}},
        metric="accuracy",
        score=score,
        metrics={"val/accuracy": score + 0.01, "test/accuracy": score, "test/f1": score - 0.05},
        trained_params=params,
        head_params=1538,
        stored_params=params + 1538,
        stored_bytes=4 * (params + 1538),
        total_params=125_000_000,
        memory={"weights": 500_000_000, "activations": 90_000_000, "peak": peak},
        time={"setup": 1.0, "train": 60.0, "step": 0.03 + 0.01 * random.random(), "total": 70.0},
        flops={"train_step": int(2e12), "forward": int(7e11), "total_train": int(2e15)},
        history=[{"step": float(s), "loss": 1 / (1 + s), "val": score} for s in range(10)],
        environment={"device": "cpu", "memory": "counted", "software": SOFTWARE, "commit": "abc123"},
    )  # fmt: skip
    return Record(**values | changes)


def write_grid(folder, tasks=("rte", "stsb"), seeds=3, methods=METHODS):
    for method, task, seed in itertools.product(methods, tasks, range(seeds)):
        synthetic(method, task, seed).save(folder)
    return folder


@pytest.fixture
def results(tmp_path):
    return write_grid(tmp_path / "results")


def frame(*records):
    """The table of a few records, through files."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        for i, record in enumerate(records):
            record.id = f"{i:012x}"
            record.save(Path(folder))
        return analysis.load(folder)


def test_load_gives_one_flat_row_per_run(results):
    runs = analysis.load(results)
    assert len(runs) == len(METHODS) * 2 * 3 and runs.attrs["problems"] == []
    row = runs.iloc[0]
    record = Record.load(results / row["id"])
    assert row["memory_peak"] == record.memory["peak"] and row["time_step"] == record.time["step"]
    assert row["flops_train_step"] == 2e12 and row["config_train_lr"] == 1e-3 and row["metrics_test/f1"] < row["score"]
    assert (
        row["protocol"] == "cut-1"
        and not row["data_standin"]
        and row["software"] == "torch 2.13.0, transformers 5.23.0"
    )
    assert row["memory_kind"] == "counted" and row["config_method_targets"] == '["query", "value"]'
    assert runs["settings"].nunique() == 1, "the seed is no setting"


def test_load_names_what_it_leaves_out(results):
    contents = {
        "empty": "",
        "cut": '{"schema": 1, "id": ',
        "list": "[1, 2]",
        "null": "null",
        "foreign": '{"hello": 1}',
        "future": '{"schema": 99}',
        "short": '{"schema": 1, "id": "x"}',
        "deep": "[" * 100_000,
        "type": json.dumps({**vars(synthetic()), "memory": [1]}),
        "number": json.dumps({**vars(synthetic()), "time": {"step": "fast"}}),
        "score": json.dumps({**vars(synthetic()), "score": "high"}),
        "status": json.dumps({**vars(synthetic()), "status": "great"}),
    }
    for name, text in contents.items():
        (results / name).mkdir()
        (results / name / "record.json").write_text(text)
    (results / "bytes").mkdir()
    (results / "bytes" / "record.json").write_bytes(b"\xff\xfe\x00")
    (results / "folder" / "record.json").mkdir(parents=True)
    (results / "note.txt").write_text("not a run")
    with pytest.warns(UserWarning, match=r"14 file\(s\) left out"):
        runs = analysis.load(results)
    assert len(runs) == len(METHODS) * 2 * 3
    assert {path.split("/")[-2] for path, _ in runs.attrs["problems"]} == {*contents, "bytes", "folder"}


def test_a_collected_file_is_read_like_its_folder(results, tmp_path, capsys):
    from analysis.__main__ import main
    from bench.collect import collect

    inside, outside = results / "results.parquet", tmp_path / "results.parquet"
    for file in (inside, outside):
        collect(results, file)
    runs = analysis.load(results)
    pd.testing.assert_frame_equal(analysis.load(inside), runs, check_like=True)  # with the paths of its predictions
    alone = analysis.load(outside)
    pd.testing.assert_frame_equal(alone.drop(columns="path"), runs.drop(columns="path"), check_like=True)
    assert not any(map(analysis.plots_runs.history_of, alone["path"]))
    texts = []
    for given in (results, outside):
        assert main(["table", str(given)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "lora" in texts[0]


def test_a_file_that_is_not_collected_names_the_way_out(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for name in ("other", "text"):
        with pytest.raises(analysis.NoRuns, match=r"not a file that python -m bench\.collect wrote"):
            analysis.load(tmp_path / f"{name}.parquet")


def test_no_runs_names_the_way_out(tmp_path):
    with pytest.raises(analysis.NoRuns, match=r"nowhere: no such folder.*python -m bench"):
        analysis.load(tmp_path / "nowhere")
    with pytest.raises(analysis.NoRuns, match=r"no record.*python -m bench"):
        analysis.load(tmp_path)


def test_summary_is_the_t_interval_over_seeds():
    runs = frame(*(synthetic(seed=s, score=v) for s, v in enumerate([0.7, 0.72, 0.74, 0.71, 0.73])))
    row = analysis.summarise(runs).iloc[0]
    values = np.array([0.7, 0.72, 0.74, 0.71, 0.73])
    half = 2.7764451 * values.std(ddof=1) / math.sqrt(5)
    assert row["n"] == 5 and row["missing"] == 0
    np.testing.assert_allclose([row["score"], row["score_sd"]], [values.mean(), values.std(ddof=1)])
    np.testing.assert_allclose([row["score_low"], row["score_high"]], [0.72 - half, 0.72 + half], rtol=1e-6)


def test_one_seed_has_no_interval_and_failures_are_counted():
    lost = synthetic(seed=1, status="diverged", score=0.1, environment={}, data={})
    row = analysis.summarise(frame(synthetic(seed=0), lost))
    assert len(row) == 1, "a run that failed early belongs to its settings"
    assert row["n"][0] == 1 and row["missing"][0] == 1 and row["score"][0] > 0.5
    assert row[["score_sd", "score_low", "score_high"]].isna().all(axis=None)


def test_the_same_seed_twice_counts_once():
    table = analysis.summarise(frame(synthetic(score=0.6), synthetic(score=0.8), synthetic(seed=1, score=0.9)))
    assert table["n"][0] == 2 and table["score"][0] == pytest.approx((0.7 + 0.9) / 2)


def test_different_configs_are_never_averaged():
    table = analysis.summarise(frame(synthetic(), synthetic(seed=1), synthetic(lr=1e-2)))
    assert sorted(table["n"]) == [1, 2]
    assert set(table["label"]) == {"lora (train_lr=0.001)", "lora (train_lr=0.01)"}
    other = {"device": "gpu", "memory": "cuda_allocator", "software": SOFTWARE}
    labels = analysis.summarise(frame(synthetic(), synthetic(environment=other)))["label"]
    assert labels.str.contains("device=").all()


def test_runs_scored_on_different_rows_are_never_averaged():
    other = {"protocol": "cut-1", "fingerprints": {"test": "other"}}
    table = analysis.summarise(frame(synthetic(), synthetic(data=other), synthetic(seed=1)))
    assert table["n"].tolist() == [2, 1] or table["n"].tolist() == [1, 2]
    assert table["label"].str.contains("data_split=").all()


def test_summary_names_an_unknown_column(results):
    with pytest.raises(ValueError, match=r"no column \['nothing'\].*task, model"):
        analysis.summarise(analysis.load(results), by=["nothing"])


@pytest.mark.parametrize("seed", range(20))
def test_front_is_the_brute_force_front(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(0, 40))
    cost, score = random.integers(0, 8, n).astype(float), random.integers(0, 8, n).astype(float)
    cost[random.random(n) < 0.1] = np.nan
    score[random.random(n) < 0.1] = np.nan
    flags = analysis.pareto(pd.DataFrame({"cost": cost, "score": score}), "cost")["front"]
    for i in range(n):
        if math.isnan(cost[i]) or math.isnan(score[i]):
            assert flags[i] is pd.NA
            continue
        beats = (cost <= cost[i]) & (score >= score[i]) & ((cost < cost[i]) | (score > score[i]))
        assert flags[i] == (not beats.any()), (cost[i], score[i])


def test_ties_stay_and_missing_rows_are_in_no_front():
    table = pd.DataFrame({"cost": [1, 1, 1, 2, np.nan, 0], "score": [0.5, 0.5, 0.4, 0.5, 0.9, np.nan]})
    assert analysis.pareto(table, "cost")["front"].tolist() == [True, True, False, False, pd.NA, pd.NA]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"standin": True}, "data_standin"),
        ({"task": "stsb"}, "task: rte, stsb"),
        ({"model": "bert"}, "model: bert, roberta_base"),
        ({"metric": "f1"}, "metric"),
        ({"data": {"protocol": "cut-2", "fingerprints": {"test": "rte"}}}, "protocol: cut-1, cut-2"),
        ({"data": {"protocol": "cut-1", "fingerprints": {"test": "zz"}}}, "test data.*rte, zz"),
    ],
)
@pytest.mark.parametrize("summarised", [True, False])
def test_mixed_rows_share_no_front(other, says, summarised):
    runs = frame(synthetic(), synthetic("dora", **other))
    with pytest.raises(analysis.Mixed, match=says):
        analysis.pareto(analysis.summarise(runs) if summarised else runs)


def test_devices_share_no_time_front_and_software_is_said():
    gpu = {"device": "gpu", "memory": "cuda_allocator", "software": SOFTWARE}
    runs = frame(synthetic(), synthetic("dora", environment=gpu))
    assert analysis.pareto(runs)["front"].notna().all()
    for cost in ("time_step", "memory_peak"):
        with pytest.raises(analysis.Mixed, match="device: cpu, gpu"):
            analysis.pareto(runs, cost)
    newer = {"device": "cpu", "memory": "counted", "software": {"torch": "9"}}
    with pytest.warns(UserWarning, match="different software"):
        analysis.pareto(frame(synthetic(), synthetic("dora", environment=newer)))


def test_a_split_cut_by_seed_is_no_mix():
    cut = [{"protocol": "p", "fingerprints": {"test": f"t{s}"}} for s in range(2)]
    runs = frame(
        *(synthetic(m, seed=s, data=cut[s]) for m in ("lora", "dora") for s in range(2)), synthetic("ia3", data=cut[0])
    )
    assert analysis.pareto(analysis.summarise(runs))["front"].any()


def test_by_draws_one_front_per_group(results):
    fronts = analysis.pareto(analysis.summarise(analysis.load(results)), by=["task", "model"])
    assert (fronts.groupby("task")["front"].sum() >= 1).all()


def test_labels_never_overlap_and_near_ones_belong_to_their_point():
    random = np.random.default_rng(0)
    for n in (1, 5, 60):
        points, sizes = random.uniform(50, 450, (n, 2)), np.column_stack([random.uniform(20, 90, n), np.full(n, 11.0)])
        boxes = [b for b in place(points, sizes, (0, 0, 500, 500)) if b]
        assert len(boxes) >= min(n, 30)
        for i, box in enumerate(boxes):
            assert not overlaps(box, boxes[:i] + boxes[i + 1 :]) and min(box) >= 0 and max(box) <= 500
            assert not any(overlaps(box, [(x - 4, y - 4, x + 4, y + 4)]) for x, y in points)


@pytest.mark.parametrize("cost", ["trained_params", "memory_peak", "time_step"])
def test_plot_draws_every_row_and_its_names_apart(results, cost):
    plt = pytest.importorskip("matplotlib.pyplot")
    from matplotlib.text import Text  # without the leader line that an annotation's own extent includes

    plt.switch_backend("agg")
    table = analysis.summarise(analysis.load(results))
    ax = analysis.plots.pareto(table[table.task == "rte"], cost)
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(t).extents for t in ax.texts if t.get_text() in METHODS]
    assert {t.get_text() for t in ax.texts} >= set(METHODS)
    assert not any(overlaps(a, [b]) for a, b in itertools.combinations(boxes, 2))
    assert sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() == "o") == len(METHODS)
    if cost == "trained_params":
        assert ax.get_xscale() == "symlog", "the linear probe costs 0 parameters"
    plt.close(ax.figure)


def test_plot_says_stand_in(results):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    ax = analysis.plots.pareto(analysis.summarise(frame(synthetic(standin=True), synthetic("dora", standin=True))))
    assert "no result" in ax.get_title() and any("STAND-IN" in t.get_text() for t in ax.texts)
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "", "0"), (294_912, "", "295k"), (1.25e8, "", "125M"), (3 * 2**29, "bytes", "1.5 GiB"), (0.034, "s", "34 ms"),
     (70.0, "s", "70 s"), (2e12, "FLOP", "2 TFLOP"), (math.nan, "", "–"), (12.0, "", "12")],
)  # fmt: skip
def test_numbers_are_written_for_people(value, unit, text):
    assert write(value, unit) == text


def command(*arguments):
    from analysis.__main__ import main

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return main([str(a) for a in arguments])


def test_table_and_plot_commands(results, tmp_path, capsys):
    synthetic("vera", seed=0, status="oom", score=None).save(results)
    assert command("table", results) == 0
    text = capsys.readouterr().out
    assert "full *" in text and "1 without score" in text and "±" in text and "125M" in text
    assert command("plot", results, "--task", "rte", "-o", tmp_path / "p.svg") == 0
    assert (tmp_path / "p.svg").stat().st_size > 10_000
    capsys.readouterr()
    assert command("plot", results, "-o", tmp_path / "p.png") == 2
    assert "--task: rte, stsb" in capsys.readouterr().err
    assert command("table", tmp_path / "nowhere") == 2
    assert "python -m bench" in capsys.readouterr().err


def test_importing_analysis_is_light():
    code = (
        "import sys, analysis, analysis.__main__; assert not {'torch', 'matplotlib', 'pandas'} & set(sys.modules);"
        "analysis.load, analysis.summarise, analysis.pareto; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


NEW = {"train": ("offload", "features", "padding"), "task": ("shots",), "method": ("bits",)}


def configured(seed, *overrides, old=False, **changes):
    """A record of a composed configuration; an old one lacks what came since."""
    config = _new_record(compose(["method=qlora", "task=rte", f"seed={seed}", *overrides])).config
    if old:
        config = {k: v for k, v in config.items() if k not in ("matmul", "lease")}
        for part, names in NEW.items():
            assert set(names) <= set(config[part])
            config[part] = {k: v for k, v in config[part].items() if k not in names}
    return synthetic("qlora", seed=seed, config=config, **changes)


def test_what_an_old_configuration_lacks_has_its_default(tmp_path):
    records = [
        configured(0, old=True),
        configured(1),
        configured(2, "train.offload=activations"),
        configured(3, "method.bits=8"),
    ]
    runs = frame(*records).sort_values("seed")
    assert runs["settings"].iloc[0] == runs["settings"].iloc[1] and runs["settings"].nunique() == 3
    assert runs["config_train_offload"].tolist() == ["none", "none", "activations", "none"]
    assert runs["config_method_bits"].tolist() == [4, 4, 4, 8]
    table = analysis.summarise(runs)
    assert sorted(table["n"]) == [1, 1, 2]
    told = (("none", 4), ("activations", 4), ("none", 8))
    assert set(table["label"]) == {f"qlora (method_bits={bits}, train_offload={offload})" for offload, bits in told}
    assert analysis.summarise(frame(*records[:2]))["label"].tolist() == ["qlora"]
    (means,) = findings.settings(frame(*records[:2]), {"score": "score"}).to_dict("records")
    assert means["n"] == 2


def test_old_configurations_are_completed_out_of_one_file_too(tmp_path):
    for i, record in enumerate((configured(0, old=True), configured(1))):
        record.id = f"{i:012x}"
        record.save(tmp_path)
    collect(tmp_path, tmp_path / "all.parquet")
    assert analysis.load(tmp_path / "all.parquet")["settings"].nunique() == 1


def test_what_no_class_knows_stays_missing():
    configs = [
        {"train": {"lr": 0.1, "gone": 1}, "classes": {"method": "none_such", "task": "none_such"}, "method": {"a": 1}}
    ]
    configs += [{"train": {"lr": 0.1}, "classes": {"method": "none_such", "task": "none_such"}, "method": {}}]
    assert complete(configs) == configs


def test_how_a_run_was_made_is_no_setting():
    runs = frame(
        configured(0), configured(1, "matmul=torch", "isolate=true", "lease=5", "cells_per_gpu=2", "shard=true")
    )
    assert runs["settings"].nunique() == 1


FLAT = {
    "device": "cpu",
    "memory": "counted",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "numpy": "2.4",
}


def on(seed, cpu="AMD EPYC", threads=2, device="cpu", **changes):
    """A record that was timed on this CPU."""
    about = FLAT | {"device": device, "cpu": cpu, "threads": threads} | changes.pop("extra", {})
    return synthetic(seed=seed, environment=about, **changes)


@pytest.mark.parametrize(
    "other",
    [{"extra": {"matmul": "onednn"}}, {"threads": 1}, {"cpu": "Intel Xeon"}],
)
def test_seconds_of_two_cpus_are_never_averaged_or_drawn_together(other):
    """Nor those of one with other threads, or with products by another library; before there was a choice, by torch."""
    runs = frame(on(0), on(1, extra={"matmul": "torch"}), on(2, **other))
    assert runs.sort_values("seed")["cpu"].iloc[0] == "AMD EPYC, 2 threads, products by torch"
    table = analysis.summarise(runs)
    assert sorted(table["n"]) == [1, 2] and "lora (cpu=AMD EPYC, 2 threads, products by torch)" in set(table["label"])
    for cost in ("time_step", "time_total"):
        with pytest.raises(Mixed, match=r"cpu: .*AMD EPYC, 2 threads, products by torch"):
            analysis.pareto(table, cost)
    for cost in ("trained_params", "memory_peak", "flops_train_step"):
        assert analysis.pareto(table, cost)["front"].notna().all()
    assert views(table.assign(view=0)).nunique() == 2


def test_what_was_not_timed_has_no_cpu_and_joins_the_others():
    """A run that was trained beside others, on one thread, is a seed like any other: its score counts."""
    fused = on(2, threads=1, time={"fused_step": 0.1, "step": None, "total": None})
    assert frame(fused)["cpu"].isna().all()
    assert analysis.summarise(frame(on(0), on(1), fused))["n"].tolist() == [3]
    assert sorted(analysis.summarise(frame(on(0), on(1, threads=4), fused))["n"]) == [1, 1, 1]


def test_a_gpu_is_not_told_by_its_cpu():
    runs = frame(on(0, device="NVIDIA A100"), on(1, "Intel Xeon", 8, device="NVIDIA A100"))
    assert runs["cpu"].isna().all() and len(analysis.summarise(runs)) == 1
    assert frame(on(0, device="2 x cpu"))["cpu"].notna().all()
    both = analysis.summarise(frame(on(0), on(1, device="NVIDIA A100")))
    assert both.set_index("device")["cpu"].isna().to_dict() == {"cpu": False, "NVIDIA A100": True}


def test_the_software_of_real_records_is_known():
    assert frame(synthetic(environment=FLAT))["software"].tolist() == ["torch 2.13.0, transformers 5.23.0"]
    newer = frame(synthetic(environment=FLAT), synthetic("dora", environment=FLAT | {"torch": "9"}))
    with pytest.warns(UserWarning, match="different software"):
        analysis.pareto(analysis.summarise(newer))
