"""Statistics against closed forms, scipy, scikit-learn and published numbers."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import analysis
from analysis import aggregate, composite, paired, power, ranks, resample, tuning
from tests.test_analysis import frame, synthetic
from tests.test_imports import OSU, needs_osu


@pytest.mark.parametrize(("b", "c", "p"), [(15, 5, 0.04139), (30, 20, 0.20264), (60, 40, 0.05689), (100, 70, 0.02584)])
def test_mcnemar_exact(b, c, p):
    assert paired.mcnemar(b, c)["exact"] == pytest.approx(p, abs=5e-6) == paired.mcnemar(c, b)["exact"]
    assert paired.mcnemar(b, c)["exact"] == pytest.approx(stats.binomtest(b, b + c).pvalue)


def test_mcnemar_mid_p_and_corners():
    found = paired.mcnemar(1, 7)  # the worked example of Fagerland et al. 2013
    assert found["exact"] == pytest.approx(0.0703, abs=5e-5) and found["mid_p"] == pytest.approx(0.0391, abs=5e-5)
    assert paired.mcnemar(0, 0) == {"exact": 1.0, "mid_p": 1.0} and paired.mcnemar(4, 4)["exact"] == 1


def table(label, prediction, **more):
    return pd.DataFrame({"row_id": range(len(label)), "label": label, "prediction": prediction, **more})


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson", "spearman", "pearson_spearman"])
@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_of_sums_are_the_metrics(metric, classes):
    """On the rows and, but for Spearman's ranks, on the rows drawn several times: against scikit-learn and scipy."""
    from tasks import metrics as reference

    random = np.random.default_rng(classes)
    n = 80
    values = metric in resample.CORRELATIONS
    label = random.normal(size=n) if values else random.integers(0, classes, n)
    given = label + random.normal(size=n) if values else np.where(random.random(n) < 0.6, label, 0)
    sums = resample.sums(metric, table(label, given), classes)
    counts = random.multinomial(n, np.full(n, 1 / n), size=3)
    for weights in [np.ones(n, int), *(counts if "spearman" not in metric else [])]:
        x, y = np.repeat(given, weights), np.repeat(label, weights)
        names = ["pearson", "spearman"] if metric == "pearson_spearman" else [metric]
        expected = np.mean([getattr(reference, name)(list(x), list(y), classes) for name in names])
        assert sums.value(weights @ sums.features) == pytest.approx(expected, abs=1e-9)


def test_metrics_of_constant_predictions_are_zero_and_of_texts_exact():
    zeros = table([0, 1, 1, 0], [1, 1, 1, 1])
    assert [float(s.value(s.features.sum(0))) for s in (resample.sums(m, zeros) for m in ("matthews", "pearson"))] == [
        0,
        0,
    ]
    texts = table(["7", "", "5"], ["7", "", "4"], score=[-1.0, -2.0, -3.0], prediction_flexible=["7", "", "5"])
    found = {m: resample.sums(m, texts) for m in ("exact_match", "exact_match_flexible", "answered", "answer_logprob")}
    assert [pytest.approx(float(s.value(s.features.sum(0)))) for s in found.values()] == [1 / 3, 2 / 3, 2 / 3, -2.0]
    with pytest.raises(ValueError, match=r"'bleu' cannot be computed.*accuracy"):
        resample.sums("bleu", texts)


def with_predictions(folder, correct, method, seed=0, **changes):
    """A record with 0/1 predictions of label 1; `correct` (rows,) says which are right."""
    record = synthetic(method, seed=seed, score=float(np.mean(correct)), **changes)
    record.id = f"{method}-{record.task}-{seed}".replace(" ", "")
    path = record.save(folder)
    rows = table(np.ones(len(correct), int), np.asarray(correct, int), score=1.0, split="test")
    pd.concat([rows, rows.assign(split="val", prediction=0)]).to_parquet(path.parent / "predictions.parquet")
    return record


def test_compare_is_mcnemar_the_bootstrap_and_the_permutation(tmp_path):
    a = np.repeat([1, 1, 0, 0], [100, 30, 15, 55]).astype(bool)
    b = np.repeat([1, 0, 1, 0], [100, 30, 15, 55]).astype(bool)
    with_predictions(tmp_path, a, "lora"), with_predictions(tmp_path, b, "dora")
    row = paired.compare(analysis.load(tmp_path), "lora", "dora", draws=20_000).iloc[0]
    assert (row["a_only"], row["b_only"], row["rows"], row["seeds"]) == (30, 15, 200, 1)
    assert row["difference"] == pytest.approx(0.075) and row["disagree"] == pytest.approx(45 / 200)
    se = math.sqrt((45 / 200 - 0.075**2) / 200)  # of the mean of 200 values in -1, 0, 1
    np.testing.assert_allclose([row["low"], row["high"]], [0.075 - 1.96 * se, 0.075 + 1.96 * se], atol=0.006)
    assert row["p_mcnemar"] == pytest.approx(stats.binomtest(30, 45).pvalue)
    assert row["p_permutation"] == pytest.approx(row["p_mcnemar"], abs=0.006), "swapping rows is the exact McNemar test"


def test_seeds_widen_the_interval_and_only_shared_ones_count(tmp_path):
    random = np.random.default_rng(0)
    base = random.random(400) < 0.7
    for seed in range(4):
        with_predictions(tmp_path, base, "lora", seed)
        better = base.copy()
        better[random.choice(400, 20 + 30 * seed, replace=False)] = True  # seeds differ much in how much they gain
        with_predictions(tmp_path, better, "dora", seed)
    with_predictions(tmp_path, base, "dora", 9)
    runs = analysis.load(tmp_path)
    many = paired.compare(runs, "dora", "lora", draws=2000).iloc[0]
    alone = paired.compare(runs[runs["seed"].isin([2])], "dora", "lora", draws=2000).iloc[0]
    assert many["seeds"] == 4 and alone["seeds"] == 1 and math.isnan(many.get("p_mcnemar", math.nan))
    assert many["high"] - many["low"] > 1.2 * (alone["high"] - alone["low"])
    found = power.detectable(pd.DataFrame([many])).iloc[0]
    each = runs[runs["seed"] < 4].pivot(index="seed", columns="method", values="score")
    gains = each["dora"] - each["lora"]
    assert many["seed_sd"] == pytest.approx(gains.std(ddof=1)) and alone["seed_sd"] == 0
    assert found["detectable"] > 1.5 * power.minimum_detectable(400, disagree=many["disagree"]), (
        "seeds are noise as well"
    )
    assert paired.by_seed(runs, "dora", "lora")["seed"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no runs of vera; the methods are dora, lora"):
        paired.compare(runs, "dora", "vera")


def test_pairs_must_be_pairs(tmp_path):
    right = np.ones(10, bool)
    with_predictions(tmp_path, right, "lora"), with_predictions(tmp_path, right[:9], "dora")
    with pytest.raises(analysis.Mixed, match="scored on different rows"):
        paired.compare(analysis.load(tmp_path), "lora", "dora")
    newer = {"device": "cpu", "memory": "counted", "software": {"torch": "9"}}
    with_predictions(tmp_path, right, "dora", environment=newer)
    with pytest.raises(analysis.Mixed, match=r"software: torch 2\.13"):
        paired.compare(analysis.load(tmp_path), "lora", "dora")
    synthetic("vera").save(tmp_path)
    with pytest.raises(FileNotFoundError, match="no predictions of vera seed 0"):
        paired.compare(analysis.load(tmp_path), "lora", "vera")


@pytest.mark.parametrize("seed", range(3))
def test_the_paired_tests_keep_their_level(seed):
    """Two methods that differ by chance alone: p-values are not too often small, the interval covers 0."""
    random = np.random.default_rng(seed)
    covered, small = 0, 0
    for _ in range(60):
        x, y = random.random((2, 150)) < 0.8
        ones = np.ones(150, int)
        found = paired.test([table(ones, x * 1)], [table(ones, y * 1)], "accuracy", draws=400, rng=random)
        covered += found["low"] <= 0 <= found["high"]
        small += found["p_permutation"] < 0.05
    assert covered >= 51 and small <= 8  # of 60: both at 5 %, four standard errors


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_noise_of_few_seeds_keeps_the_level(seeds):
    """Methods that differ by the luck of their seeds alone (6 points each): 5 % of the comparisons say otherwise."""
    random, ones, false = np.random.default_rng(seeds), np.ones(600, int), 0
    for _ in range(80):
        rates = 0.7 + 0.06 * random.normal(size=(2, seeds))
        x, y = ([table(ones, (random.random(600) < rate) * 1) for rate in side] for side in rates)
        false += paired.test(x, y, "accuracy", draws=200, rng=random)["p_bootstrap"] < 0.05
    assert false <= 10, "80 times 5 % is 4, with a standard deviation of 1.9"


def test_holm_is_the_textbook():
    np.testing.assert_allclose(ranks.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert ranks.holm([]).size == 0 and ranks.holm([0.9, 0.8]).max() == 1


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.344), (5, 2.728), (10, 3.164), (13, 3.313), (20, 3.544)])
def test_nemenyi_quantiles(k, q):
    assert ranks.critical_distance(k, 7) == pytest.approx(q * math.sqrt(k * (k + 1) / 42), rel=2e-4)


def test_ranks_of_a_clear_case():
    scores = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)) / 10 + [0, 0, 5], columns=list("abc"))
    assert ranks.mean_ranks(scores).index[0] == "c" and ranks.mean_ranks(scores)["c"] == 1
    data = ranks.critical_difference(scores)
    assert data.attrs["bars"] == [(1, 2)] and data["groups"].tolist() == [(), (0,), (0,)]
    assert ranks.critical_difference(scores, "wilcoxon").attrs["bars"] == [(1, 2)]
    p = ranks.nemenyi(scores)
    assert p.loc["c", "a"] < 1e-6 and p.loc["a", "b"] > 0.05 and (np.diag(p) == 1).all()
    line = ranks.wilcoxon(scores, "c").set_index("method").loc["a"]
    assert line["loss"] == 30 and line["p"] == pytest.approx(stats.wilcoxon(scores["a"] - scores["c"]).pvalue)
    table = ranks.win_tie_loss(scores, margin=10.0)
    assert len(table) == 6 and (table["tie"] == 30).all()
    with pytest.raises(ValueError, match="needs 3 methods"):
        ranks.friedman(scores[["a", "b"]])


def test_win_tie_loss_counts_tasks_for_each_ordered_pair():
    scores = pd.DataFrame({"a": [0.9, 0.8, 0.7, 0.6, 0.5], "b": [0.8, 0.8, 0.75, 0.5, 0.51], "c": [0.0] * 5})
    exact = ranks.win_tie_loss(scores).set_index(["method", "other"])
    assert exact.loc[("a", "b")].tolist() == [2, 1, 2] and exact.loc[("c", "a")].tolist() == [0, 0, 5]
    assert len(exact) == 6 and (exact.sum(axis=1) == 5).all()
    swapped = exact.swaplevel().loc[exact.index]
    assert (exact["win"] == swapped["loss"]).all() and (exact["tie"] == swapped["tie"]).all()
    wide = ranks.win_tie_loss(scores, margin=0.05).set_index(["method", "other"])
    assert wide.loc[("a", "b")].tolist() == [2, 3, 0], "a difference of the margin itself is a tie"


def test_equal_on_paper_is_a_tie():
    scores = pd.DataFrame({"a": [0.1 + 0.2, 0.5], "b": [0.3, 0.5]})
    assert ranks.win_tie_loss(scores)["tie"].tolist() == [2, 2] and ranks.mean_ranks(scores).tolist() == [1.5, 1.5]
    assert ranks.wilcoxon(scores, "b")["p"].tolist() == [1.0]


@pytest.mark.parametrize("seed", range(4))
def test_signed_rank_is_exact_with_ties_and_without(seed):
    random = np.random.default_rng(seed)
    plain, tied = random.normal(0.3, size=11), random.integers(-2, 4, 9).astype(float)
    assert ranks.signed_rank(plain) == pytest.approx(stats.wilcoxon(plain, method="exact").pvalue)
    sizes = stats.rankdata(np.abs(tied[tied != 0]))
    sums = np.array([np.dot(sizes, signs) for signs in itertools.product((0, 1), repeat=len(sizes))])
    seen = sizes[tied[tied != 0] > 0].sum()
    assert ranks.signed_rank(tied) == pytest.approx(min(1, 2 * min((sums <= seen).mean(), (sums >= seen).mean())))


def test_by_task_refuses_what_does_not_belong_together():
    runs = frame(
        *(synthetic(m, t, s) for m in ("lora", "dora") for t in ("rte", "stsb") for s in (0, 1)), synthetic("ia3")
    )
    means = ranks.by_task(runs, ["lora", "dora"])
    assert means.shape == (2, 2) and means.attrs["dropped"] == []
    assert ranks.by_task(runs).attrs["dropped"] == ["stsb / roberta_base"]
    other = {"device": "cpu", "memory": "counted", "software": {"torch": "9"}}
    for record, says in (
        (synthetic("dora", standin=True), "data_standin"),
        (synthetic("dora", environment=other), "software"),
        (synthetic("dora", data={"protocol": "cut-2"}), "protocol: cut-1, cut-2"),
        (synthetic("dora", data={"revision": "z", "protocol": "cut-1"}), "data_revision: abc, z"),
        (synthetic("lora", lr=1e-2), "lora has 2 settings on rte"),
    ):
        with pytest.raises(analysis.Mixed, match=says):
            ranks.by_task(frame(synthetic(), record))
    cut = {"protocol": "cut-2", "fingerprints": {"test": "q"}}
    assert len(ranks.by_task(frame(synthetic(), synthetic(task="stsb", data=cut)))) == 2, "protocols belong to tasks"


def test_interquartile_mean():
    assert aggregate.iqm(range(20)) == 9.5 and aggregate.iqm([1, 2, 3, 100]) == 2.5
    assert aggregate.iqm([1, 2, 3, 4, 100]) == 3.0


def grid(values, metric="accuracy"):
    """Records of {method: {task: [score of each seed]}}."""
    cells = [(m, t, s, v) for m, ts in values.items() for t, vs in ts.items() for s, v in enumerate(vs)]
    return frame(*(synthetic(m, t, s, score=v, metric=metric) for m, t, s, v in cells))


def test_aggregate_draws_seeds_within_tasks():
    runs = grid({"lora": {"a": [0.1, 0.3], "b": [0.9, 0.9]}, "dora": {"a": [0.2], "b": [0.8], "c": [0.0]}})
    table = aggregate.aggregate(runs, draws=4000).set_index("method")
    assert table.loc["lora", "mean"] == pytest.approx(0.55) and table.attrs["dropped"] == ["c / roberta_base"]
    assert (table.loc["lora", "mean_low"], table.loc["lora", "mean_high"]) == pytest.approx((0.5, 0.6))
    assert math.isnan(table.loc["dora", "iqm_low"]) and table.loc["dora", "runs"] == 2
    found = aggregate.improvement(runs, "lora", "dora", draws=2000)
    ties = aggregate.improvement(grid({"lora": {"a": [0.2, 0.3]}, "dora": {"a": [0.2, 0.2]}}), "lora", "dora", draws=10)
    assert ties["probability"] == pytest.approx(0.75)
    assert found["probability"] == pytest.approx((0.5 + 1) / 2) and found["low"] == 0.5 and found["high"] == 1


def test_metrics_of_another_scale_need_ranges():
    runs = frame(synthetic("lora", "rte", score=0.7), synthetic("lora", "cola", score=0.35, metric="matthews"))
    with pytest.raises(analysis.Mixed, match=r"accuracy, matthews.*ranges="):
        aggregate.aggregate(runs)
    assert aggregate.aggregate(runs, ranges={"rte": (0.5, 1), "cola": (0, 0.7)})["mean"][0] == pytest.approx(0.45)


def test_the_area_under_a_profile_is_the_mean():
    random = np.random.default_rng(0)
    runs = grid({"lora": {"a": random.random(5), "b": random.random(5)}})
    found = aggregate.profile(runs, np.linspace(0, 1, 2001), draws=50)
    assert np.trapezoid(found["share"], found["threshold"]) == pytest.approx(runs["score"].mean(), abs=1e-3)
    assert (found["low"] <= found["share"] + 0.2).all() and found["share"].is_monotonic_decreasing


def test_minimum_detectable_difference():
    assert power.minimum_detectable(1319, disagree=0.2, power=0.5) == pytest.approx(0.0241, abs=5e-5)
    assert power.minimum_detectable(1319, accuracy=0.478, power=0.5) == pytest.approx(0.038, abs=5e-4)
    assert power.minimum_detectable(10**9, disagree=0.2, seeds=5, seed_sd=0.02, power=0.5) == pytest.approx(
        2.776 * 0.02 / math.sqrt(5), rel=1e-3
    ), "with endless rows it is the t interval over seeds"
    found = power.minimum_detectable(500, disagree=0.1)
    assert power.rows_needed(found, 0.1) in (500, 501)
    with pytest.raises(ValueError, match="one of disagree"):
        power.minimum_detectable(10)


def test_the_detectable_difference_is_detected_four_times_of_five():
    random, rows, disagree = np.random.default_rng(1), 800, 0.15
    gap = power.minimum_detectable(rows, disagree=disagree)
    shares = [(disagree + gap) / 2, (disagree - gap) / 2, 1 - disagree]
    hits = sum(paired.mcnemar(b, c)["mid_p"] < 0.05 for b, c, _ in random.multinomial(rows, shares, size=400))
    assert 0.73 < hits / 400 < 0.88


def test_wilson():
    np.testing.assert_allclose(power.wilson(631, 1319), (0.45154, 0.50537), atol=5e-6)
    np.testing.assert_allclose(power.wilson(0, 1319), (0, 0.00290), atol=5e-6)
    assert power.unpaired(0.5, 0.5, 10)["p"] == 1 and power.unpaired(0.0, 0.0, 10)["p"] == 1


def test_expected_best_of_n():
    assert tuning.expected_best([1, 2, 3, 4, 5], 2) == pytest.approx(4.0)
    assert tuning.expected_best([1, 2, 3, 4, 5], 2, replace=True) == pytest.approx(3.8)
    values = np.random.default_rng(0).normal(size=7)
    for n in range(1, 8):
        every = np.mean([max(c) for c in itertools.combinations(values, n)])
        assert tuning.expected_best(values, n) == pytest.approx(every)
    assert tuning.expected_best(values, 99) == values.max()


def test_the_curve_follows_the_choice_on_val():
    """Val and test disagree about the best trial: the test curve falls where val errs, and a failure counts as tried."""
    trials = pd.DataFrame(
        {"method": "lora", "task": "rte", "val": [0.5, 0.6, 0.9, np.nan], "score": [0.5, 0.8, 0.4, np.nan]}
    )
    found = tuning.curve(trials, draws=200).set_index("n")
    assert found.index.tolist() == [1, 2, 3, 4] and found.loc[4, "val"] == pytest.approx(0.9)
    assert found.loc[4, "test"] == pytest.approx(0.4) and found.loc[1, "val"] == pytest.approx(
        (0.5 + 0.6 + 0.9 + 0.5) / 4
    )
    pairs = [
        max(p, key=lambda t: t[0])
        for p in itertools.combinations([(0.5, 0.45), (0.5, 0.45), (0.6, 0.8), (0.9, 0.4)], 2)
    ]
    assert found.loc[2, "test"] == pytest.approx(np.mean([t for _, t in pairs]))
    assert (found["val_low"] <= found["val"]).all() and (found["val_high"] >= found["val"] - 1e-9).all()


def test_selection_takes_the_best_val_and_counts_what_was_tried():
    runs = frame(
        *(synthetic(seed=s, lr=lr, metrics={"val/accuracy": v}, score=t) for s in (0, 1)
          for lr, v, t in ((1e-3, 0.7, 0.9), (1e-2, 0.8, 0.6))), synthetic(lr=1.0, status="diverged", score=None)
    )  # fmt: skip
    chosen = tuning.selected(runs)
    assert chosen["score"].tolist() == [0.6, 0.6] and chosen["trials"].tolist() == [3, 3]


def test_selection_gaps():
    metrics = {"val/accuracy": 0.8, "test/accuracy": 0.7, "last_val/accuracy": 0.75}
    row = tuning.selection_gap(frame(synthetic(score=0.7, metrics=metrics))).iloc[0]
    assert row["val_minus_test"] == pytest.approx(0.1) and row["best_minus_last_val"] == pytest.approx(0.05)
    assert math.isnan(row["best_test_minus_test"])


PUBLISHED = pd.DataFrame(  # tables of arXiv 2511.21285
    [("ia3", 74.7, 196608, 8.69, 28.41, 55.62), ("prompt", 50, 409600, 10.05, 42.47, 29.49), ("prefix", 45.9, 34177536, 8.39, 27.61, 33.18),
     ("ptuning", 51.7, 53130752, 10.06, 34.53, 29.26), ("lora", 80.1, 14680064, 8.38, 27.75, 60.08), ("ln", 77.8, 266240, 8.38, 27.43, 60.19),
     ("bitfit", 75.3, 163840, 8.38, 27.2, 58.38)], columns=["method", "score", "trained_params", "tflops", "memory_gb", "pscp"],
)  # fmt: skip


def test_pscp_is_the_papers_and_its_order_moves_with_beta():
    table = PUBLISHED.assign(tflops_extra=PUBLISHED["tflops"] - 8.38)
    found = composite.pscp(table["score"], table["trained_params"], table["tflops_extra"], table["memory_gb"])
    np.testing.assert_allclose(found, table["pscp"], atol=0.04)  # inputs are rounded
    first = composite.orders(table).query("rank == 1").set_index("beta")["method"]
    assert first[0.5] == "lora" and first[1.0] == "ln" and first[4.0] == "ln"


@needs_osu
def test_ppt_and_the_published_vtab_statistics():
    runs = analysis.load(OSU)
    means = runs.groupby("method")[["score", "trained_params"]].mean()
    ppt = pd.Series(composite.ppt(means["score"], means["trained_params"]), means.index)
    assert composite.ppt(0.5, 0) == 0.5 and ppt["lora"] < means.loc["lora", "score"]
    peft = runs[~runs["method"].isin(["full", "linear", "vpt_shallow"])]
    scores = ranks.by_task(peft)
    found = ranks.friedman(scores)
    np.testing.assert_allclose([found["chi2"], found["f"], found["cd"]], [44.9326, 4.4180, 4.1857], atol=5e-5)
    np.testing.assert_allclose(
        ranks.mean_ranks(scores)[["convpass", "lora", "vpt_deep"]], [4.632, 7.5, 9.868], atol=5e-4
    )
    holm = ranks.wilcoxon(scores, "lora").set_index("method")
    np.testing.assert_allclose(holm.loc[["rand_h_adapter", "adaptformer"], "p"], [0.0141, 0.0446], atol=1e-4)
    assert holm.loc["convpass", "p"] == pytest.approx(0.03174, abs=1e-5), ".0323 where floating point breaks a tie"
    np.testing.assert_allclose(holm.loc[["rand_h_adapter", "vpt_deep"], "p_holm"], [0.169, 0.542], atol=1e-3)
    best = ranks.critical_difference(scores)
    assert best.attrs["bars"][0] == (0, 10), "11 of 13 methods cannot be told apart from the first"
    iqms = aggregate.aggregate(peft, draws=10).set_index("method")["iqm"] * 100
    np.testing.assert_allclose(iqms[["fact_tt", "convpass", "lora"]], [77.02, 76.52, 76.13], atol=0.005)
    pair = aggregate.improvement(runs, "convpass", "lora")
    assert pair["probability"] == pytest.approx(0.632, abs=5e-4) and math.isnan(pair["low"])
    gaps = tuning.gap_by_method(tuning.selection_gap(runs))
    assert gaps.index[0] == "full" and 100 * gaps.loc["full", "mean"] == pytest.approx(7.43, abs=0.005)
