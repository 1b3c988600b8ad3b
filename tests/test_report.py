"""The report is one inert file that draws itself in a real browser."""

import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis import panels
from analysis.__main__ import main
from analysis.report import report
from tests.test_analysis import METHODS, synthetic, write_grid

EVIL = [
    "<img src=x onerror=\"document.title='pwned'\">",
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
    "--dump-dom",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = write_grid(folder / "results")
    for name in EVIL:
        synthetic(name, id=f"evil{EVIL.index(name)}", reason=name).save(results)
    synthetic("lora", "sst2", standin=True).save(results)
    synthetic("vera", status="skipped", score=None, reason="no <b>layer</b> fits").save(results)
    (results / "broken").mkdir()
    (results / "broken" / "record.json").write_text("{")
    with pytest.warns(UserWarning):
        return report(analysis.load(results), folder / "report.html")


def test_a_copy_with_its_plots_goes_to_wandb(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SILENT", "true")
    results = write_grid(tmp_path / "results")
    assert main(["report", str(results), "-o", str(tmp_path / "out" / "report.html"), "--wandb", "offline"]) == 0
    assert "mirrored in W&B" in capsys.readouterr().out
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    plots = [file.relative_to(run).as_posix() for file in run.rglob("*.png")]
    assert {name for name in plots if "trained_params" in name} and {name for name in plots if "memory_peak" in name}
    assert any(file.suffix == ".html" for file in run.rglob("*")) and any(
        "table" in f.name for f in run.rglob("*.json")
    )


def test_the_pareto_view_is_a_panel_of_wandb(tmp_path, monkeypatch):
    """Offline: the logged charts name the panel, and their tables have the columns that the saved panel's fields ask for."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    table = analysis.summarise(analysis.load(write_grid(tmp_path / "results")))
    table["view"] = analysis.report.views(table)
    plain, saved = panels.panels(table), panels.panels(table, "us/paretune_pareto")
    assert len(plain) == len(saved) == 2 * 4 and "pareto_panel/rte roberta_base memory_peak" in plain
    chart = saved["pareto_panel/rte roberta_base trained_params"]
    assert chart.spec.spec_name == "us/paretune_pareto" and set(chart.spec.fields.values()) <= set(chart.table.columns)
    front = {
        row[chart.table.columns.index("method")] for row in chart.table.data if row[chart.table.columns.index("front")]
    }
    assert "linear_probe" in front and "full" in front
    content = json.loads(panels.spec())
    asked = set(re.findall(r"\$\{(\w+):(\w+)\}", panels.spec()))
    assert {name for kind, name in asked if kind == "field"} == set(chart.spec.fields)
    assert {name for kind, name in asked if kind == "string"} == set(chart.spec.string_fields)
    assert content["data"] == {"name": "wandb"}


def visit(page, tmp_path, state=""):
    """The drawn page and what the browser's console said."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*command, f"file://{page}{state}"], capture_output=True, text=True, timeout=90)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


def points(dom):
    return re.findall(r'<circle class="point"[^>]* aria-label="([^:"]*)', dom)


def test_the_file_is_self_contained_and_its_text_inert(page):
    text = page.read_text()
    assert not re.search(r"<script[^>]+src|<link|@import|url\(|<iframe|<img", text)
    assert text.count("</script>") == 2 and len(text) < 200_000, "the data block and the scripts, nothing closed early"
    content = re.search(r'<script type="application/json" id="payload">(.*?)</script>', text, re.S).group(1)
    data = json.loads(content)
    assert {row["method"] for row in data["rows"]} >= set(EVIL)
    assert "<" not in content
    assert data["counts"]["ok"] == len(METHODS) * 6 + 4 and data["counts"]["skipped"] == 1
    assert data["problems"][0][0].endswith("broken/record.json")


def test_rows_that_may_not_share_a_front_are_views_apart(tmp_path):
    gpu = {"device": "gpu", "memory": "cuda_allocator"}
    synthetic("lora", id="a").save(tmp_path)
    synthetic("dora", id="b").save(tmp_path)
    synthetic("lora", id="c", environment=gpu).save(tmp_path)
    synthetic("dora", id="d", data={"fingerprints": {"test": "other"}}).save(tmp_path)
    data = analysis.report.payload(analysis.load(tmp_path), "t")
    assert sorted(row["view"] for row in data["rows"]) == [0, 0, 1, 2]


def test_one_run_without_any_score_still_reports(tmp_path):
    synthetic(status="failed", score=None, metrics={}, trained_params=None, memory={}, time={}, flops={}).save(tmp_path)
    assert report(analysis.load(tmp_path), tmp_path / "r.html").exists()


@browser
def test_it_draws_every_method_of_a_task_and_nothing_runs(page, tmp_path):
    dom = visit(page, tmp_path, "#task=rte")
    assert len(points(dom)) == len(METHODS) + len(EVIL)
    assert "<title>Paretune report</title>" in dom and "pwned" not in re.search("<title>(.*?)</title>", dom).group(1)
    assert not re.search(r"<img|<b>layer", dom)
    assert "log scale" in dom and 'class="stair"' in dom and "no &lt;b&gt;layer&lt;/b&gt; fits" in dom
    assert "Generated stand-in data" in dom and "broken/record.json" in dom


@browser
def test_the_address_chooses_task_cost_methods_and_theme(page, tmp_path):
    dom = visit(page, tmp_path, "#task=stsb&cost=memory_peak&methods=lora,dora&theme=dark&table=task")
    assert sorted(points(dom)) == ["dora", "lora"]
    names = re.findall(r'class="line [^"]*" data-name="([^"]*)"', dom)
    assert sorted(set(names)) == ["dora", "lora"], "the learning curves follow the filter"
    assert "Peak memory (bytes)" in dom and 'data-theme="dark"' in dom and "Methods: 2 of 6" in dom
    assert "2 of 17 rows" in dom
    lit = visit(page, tmp_path, f"#task={'sst2%20(stand-in)'}")
    assert points(lit) == ["lora"] and 'class="watermark"' in lit and 'class="tag"' in lit


@browser
def test_pickers_filters_sorting_and_csv_work(page, tmp_path):
    """The page is used by a script that is added to a copy: it picks, filters, sorts, and writes down what it sees."""
    drive = """
    const act = (id, value) => { const e = byId(id); e.value = value; e.dispatchEvent(new Event(id === "find" ? "input" : "change")); };
    const count = () => document.querySelectorAll("circle.point").length, axis = () => document.querySelector("#plot svg").textContent;
    const seen = { before: count() };
    act("pick-task", "stsb"); seen.task = count();
    act("pick-cost", "time_step"); seen.axis = axis().includes("Time per step (s)");
    act("pick-score", "metrics_test/f1"); seen.score = axis().includes("test/f1");
    byId("controls").querySelector(".methods input").click(); seen.unticked = count();
    document.querySelector("#methods button").click(); seen.all = count();
    act("find", "lor"); seen.found = document.querySelectorAll("#results tbody tr").length; act("find", "");
    const first = () => document.querySelector("#results tbody td").textContent;
    const head = [...document.querySelectorAll("#results th button")].find(b => b.textContent.startsWith("method")); head.click(); seen.first = first();
    [...document.querySelectorAll("#results th button")].find(b => b.textContent.startsWith("method")).click(); seen.last = first();
    document.querySelector("circle.point").dispatchEvent(new Event("pointerenter")); seen.tip = !byId("tip").hidden && byId("tip").textContent;
    act("pick-table", ALL); S.methods = null; render(); seen.csv = csv(); seen.hash = location.hash;
    document.body.replaceChildren(el("pre", { id: "seen" }, JSON.stringify(seen)));
    """
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</script>\n</body>", f"{drive}</script>\n</body>"))
    dom = visit(copy, tmp_path / "profile", "#task=rte")
    text = re.search('<pre id="seen">(.*)</pre>', dom, re.S).group(1)
    seen = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["before"] == len(METHODS) + len(EVIL) and seen["task"] == seen["all"] == len(METHODS)
    assert seen["axis"] and seen["score"] and seen["unticked"] == len(METHODS) - 1 and seen["found"] == 1
    assert (seen["first"], seen["last"]) == ("bitfit", "lora") and "Seeds: 3" in seen["tip"]
    assert "task=stsb" in seen["hash"] and "cost=time_step" in seen["hash"]
    lines = seen["csv"].strip().split("\r\n")
    assert len(lines) == 1 + 17 and lines[0].startswith('"task","model","method"') and '"score_low"' in lines[0]


def rich(folder):
    """Runs with predictions, tuning, spectra, allocated ranks; one of another software, one scored on other rows."""
    random = np.random.default_rng(0)
    right = {m: random.random(300) < p for m, p in {"lora": 0.9, "ia3": 0.3, "full": 0.6, "odd": 0.6}.items()}
    right["dora"] = right["lora"] ^ (np.arange(300) < 3)
    for method, task, seed in itertools.product(right, ("rte", "stsb", "mrpc"), range(2)):
        software = {"torch": "9" if method == "full" else "2"}
        facts = {"device": "cpu", "memory": "counted", "software": software}
        history = [{"step": float(s), "loss": 1 / (1 + s), "rank": 64.0 - s} for s in range(5)]
        lost = {"forgetting": 0.25, "measure": "pseudo-loss"}
        spectra = {
            "matrices": 4,
            "changed": 4,
            "intruders": 7,
            "k": 10,
            "epsilon": 0.5,
            "intruders_at_0.3": 1,
            "intruders_at_0.5": 7,
        }
        record = synthetic(method, task, seed, environment=facts, history=history, spectra=spectra, forgetting=lost)
        record.score = float(right[method].mean())
        record.metrics = {"val/accuracy": record.score}
        save_predictions(record, folder, right[method], offset=100 if method == "odd" else 0)
        if method == "lora":
            save_spectra(record, folder)
            save_sweep(record, folder, seed)
        if (method, task) == ("lora", "rte"):
            worse = synthetic(method, task, seed, lr=9.0, environment=facts, metrics={"val/accuracy": 0.1}, score=0.2)
            worse.save(folder)
    return folder


def save_spectra(record, folder, layers=3):
    """Two matrices per layer with two intruders each; the change is in the first layer only."""
    rows = [
        {"name": f"{i}.{kind}", "layer": i, "kind": kind, "cos_left": [0.9, 0.1, 0.2, 0.95], "norm": 2.0,
         "norm_ratio": 0.5 * (i == 0)}
        for i in range(layers) for kind in ("query", "value<b>")
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / record.id / "spectra.parquet", index=False)


def save_sweep(record, folder, seed):
    """Without the intruder the model forgets less; without its neighbour the score falls."""
    rows = [
        ("intruder", 0.0, 0.8, 0.1),
        ("intruder", 1.0, 0.8, 0.3),
        ("neighbour", 0.0, 0.5, 0.3),
        ("neighbour", 1.0, 0.8, 0.3),
    ]
    table = pd.DataFrame(rows, columns=["vector", "lambda", "score", "forgetting"]).assign(split="val", which="top")
    table["score"] += 0.1 * seed
    table.to_parquet(folder / record.id / "causal.parquet", index=False)


def save_predictions(record, folder, right, offset):
    label = np.arange(len(right)) % 2
    table = pd.DataFrame({"row_id": np.arange(len(right)) + offset, "label": label})
    table = table.assign(prediction=np.where(right, label, 1 - label), score=0.5, split="test")
    table.to_parquet(record.save(folder).parent / "predictions.parquet", index=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    runs = analysis.load(rich(folder / "results"))
    return runs, report(runs, folder / "report.html")


def test_the_matrix_of_a_task_says_what_it_compared_and_what_not(whole):
    data = analysis.report.payload(whole[0], "t")
    (found,) = [m for m in data["matrices"] if m["task"] == "rte"]
    said = {frozenset((found["names"][i], found["names"][j])): rest for i, j, *rest in found["pairs"]}
    lora = next(n for n in found["names"] if n.startswith("lora"))
    assert lora == "lora (train_lr=0.001)" and len(found["names"]) == 5, "of two settings the one that val chose"
    gap, p, evidence = said[frozenset((lora, "ia3"))]
    assert abs(gap) > 0.5 and p < 0.001 and evidence == "predictions"
    assert said[frozenset((lora, "dora"))][1] > 0.05
    assert said[frozenset((lora, "full"))][1:] == [None, "software"]
    assert said[frozenset((lora, "odd"))][1:] == [None, "other test rows"]
    (overview,) = data["overviews"]
    assert "differ in software" in overview["reason"], "over tasks the guard refuses as well"


def test_layers_are_means_over_seeds_and_a_broken_table_of_them_is_named(whole, tmp_path):
    data = analysis.report.payload(whole[0], "t")
    (lora,) = [r for r in data["rows"] if r["task"] == "rte" and r["label"] == "lora (train_lr=0.001)"]
    assert lora["layers"]["layers"] == [0, 1, 2] and lora["layers"]["kinds"] == ["query", "value<b>"]
    assert lora["layers"]["intruders"] == [[2, 2]] * 3 and lora["layers"]["share"] == [[0.5, 0.5], [0, 0], [0, 0]]
    record = synthetic(spectra={"matrices": 6, "changed": 6, "k": 10, "epsilon": 0.5})
    (record.save(tmp_path).parent / "spectra.parquet").write_text("PAR1")
    broken = analysis.report.payload(analysis.load(tmp_path), "t")
    assert broken["rows"][0]["layers"] == {} and broken["problems"][0][0].endswith("spectra.parquet")


def test_the_sweep_of_a_row_is_its_mean_and_span_and_a_broken_one_is_named(whole, tmp_path):
    data = analysis.report.payload(whole[0], "t")
    rows = {r["label"]: r["sweep"] for r in data["rows"] if r["task"] == "rte"}
    found = rows["lora (train_lr=0.001)"]
    assert found["score"]["neighbour"] == [[0, 1], [0.55, 0.85], [0.5, 0.8], [0.6, 0.9]] and found["runs"] == 2
    assert found["forgetting"]["intruder"][1] == [0.1, 0.3] and rows["dora"] == {}
    (synthetic().save(tmp_path).parent / "causal.parquet").write_text("PAR1")
    broken = analysis.report.payload(analysis.load(tmp_path), "t")
    assert broken["rows"][0]["sweep"] == {} and broken["problems"][0][0].endswith("causal.parquet")


@browser
def test_every_section_is_drawn(whole, tmp_path):
    dom = visit(whole[1], tmp_path, "#task=rte&curve=rank&row=dora")
    for name in ("record", "significance", "tasks", "memory", "time", "learning", "tuning", "spectra", "causal"):
        part = re.search(f'<section id="{name}"(.*?)</section>', dom, re.S).group(1)
        assert not part.startswith(" hidden") and ("<td" in part or 'class="line' in part or 'class="fill' in part), (
            name
        )
    assert "pair better" in dom and "different software: not compared" in dom and "Not compared: one comparison" in dom
    curves = re.search('<section id="learning"(.*?)</section>', dom, re.S).group(1)
    assert ">rank</text>" in curves and re.search(r'<option value="rank" selected="">', curves)
    assert "Runs of dora: rte" in dom
    scaled = re.search('<section id="causal"(.*?)</section>', dom, re.S).group(1)
    assert scaled.count('data-name="intruder"') == scaled.count('data-name="neighbour"') == 2 and "2 runs" in scaled
    maps = re.search('<section id="spectra"(.*?)</section>', dom, re.S).group(1)
    assert "Share of the squared change" in maps and "50.0 %" in maps and "value&lt;b&gt;" in maps
    assert "forgetting (pseudo-loss)" in maps and "<td>0.25</td>" in maps


@browser
def test_ranks_over_tasks_are_drawn_where_they_may_be_compared(page, tmp_path):
    dom = visit(page, tmp_path, "#task=rte")
    assert "Critical-difference diagram" in dom and "Mean ranks over 2 tasks" in dom
    assert "It cannot: 2 tasks give no p below 0.5" in dom


@browser
def test_a_phone_shows_no_wider_page(whole, tmp_path):
    """In a frame of 390 pixels nothing but the tables' own scroll areas is wider than the frame."""
    probe = "document.title = `wide ${document.documentElement.scrollWidth}`; parent.postMessage(document.title, '*');"
    inner = tmp_path / "inner.html"
    inner.write_text(whole[1].read_text().replace("</script>\n</body>", f"{probe}</script>\n</body>"))
    outer = tmp_path / "outer.html"
    frame = f'<iframe src="{inner.as_uri()}#task=rte" style="width:390px;height:800px"></iframe><pre id="said"></pre>'
    outer.write_text(f"{frame}<script>onmessage = e => {{ said.textContent = e.data; }}</script>")
    said = re.search(r'<pre id="said">wide (\d+)</pre>', visit(outer, tmp_path / "profile"))
    assert 300 < int(said.group(1)) <= 390
