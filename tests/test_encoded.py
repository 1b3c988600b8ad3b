"""Encoded rows: the same with and without the cache, encoded once for all processes, and never a damaged file."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import ByT5Tokenizer

from bench import encoded_cache
from bench.batches import TrainBatches, eval_batches
from bench.config import compose
from bench.encoded import Encoded, encode_rows, encode_splits
from bench.run import run
from tasks import DataConfig, Rows, compose_task
from tasks.classification import Classification

ROOT = Path(__file__).parents[1]
STANDIN = DataConfig(mode="standin")
TEXT = ByT5Tokenizer(model_max_length=512)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path))
    monkeypatch.delenv("PARETUNE_ENCODED_GB", raising=False)
    encoded_cache._opened.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The rows that were encoded by this process."""
    seen = []
    inner = Classification.encode
    monkeypatch.setattr(Classification, "encode", lambda self, row, p: seen.append(row) or inner(self, row, p))
    return seen


def load(name="rte", *overrides):
    task = compose_task(name, ["task.limit={train: 60, val: 20, test: 20}", *overrides])
    return task, task.load(STANDIN)


def files():
    return sorted(encoded_cache.folder().glob("*.arrow"))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("name", ["rte", "stsb", "sst2", "gsm8k", "boolq_choice", "arc_challenge"])
def test_batches_are_those_of_rows_encoded_one_by_one(name):
    task, rows = load(name)
    for split, shared in encode_splits(rows, task, TEXT).items():
        plain = [task.encode(row, TEXT) for row in rows.splits[split]]
        assert [shared[i] for i in range(len(shared))] == plain
        assert all(
            type(x) is type(y) for i in range(3) for x, y in zip(shared[i].values(), plain[i].values(), strict=True)
        )
        assert [shared.length(i) for i in range(len(shared))] == [len(row["input_ids"]) for row in plain]
        alone = Encoded(rows.splits[split], task, TEXT)
        train = [TrainBatches(side, batch_size=7, seed=3, buckets=2) for side in (shared, alone)]
        assert all(equal(train[0][step], train[1][step]) for step in range(20))
        both = zip(eval_batches(shared, 8), eval_batches(alone, 8), strict=True)
        assert all(equal(a, b) and rows_a == rows_b for (a, rows_a), (b, rows_b) in both)
    assert len(files()) == 3


def test_a_second_run_encodes_nothing(calls):
    task, rows = load()
    first = encode_splits(rows, task, TEXT)
    assert sum(len(e[0]) > 0 for e in first.values()) == 3 and len(calls) == 100
    again = encode_splits(task.load(STANDIN), task, TEXT)
    assert again["train"][5] == first["train"][5] and len(calls) == 100


def test_nothing_is_copied_out_of_the_file(calls):
    task, rows = load()
    row = encode_splits(rows, task, TEXT)["train"][7]
    encoded_cache._opened.cache_clear()
    before = pa.total_allocated_bytes()
    again = encode_splits(rows, task, TEXT)["train"]
    assert again[7] == row and len(calls) == 60
    assert pa.total_allocated_bytes() - before < files()[0].stat().st_size / 20


def test_images_are_encoded_each_time():
    @dataclasses.dataclass
    class Pixels:
        kind, seen = "image", 0

        def task_of(self, split):
            return self

        def encode(self, row, processor):
            self.seen += 1
            return {"pixel_values": torch.tensor([row["grey"]]), "labels": 1}

    task = Pixels()
    rows = Rows({"train": [{"grey": 0.5}]}, {"fingerprints": {"train": "1"}})
    encoded = encode_splits(rows, task, TEXT)["train"]
    assert encoded[0]["pixel_values"] == encoded[0]["pixel_values"] == 0.5 and task.seen == 2
    assert encoded.length(0) == encoded.truncated == 0 and not files()


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "flipped checksum"])
def test_a_damaged_file_is_seen_and_encoded_again(damage, calls, caplog):
    task, rows = load()
    whole = [encode_splits(rows, task, TEXT)["train"][i] for i in range(60)]
    (path,) = files()
    content = bytearray(path.read_bytes())
    content[-5 if damage == "flipped checksum" else len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-1000], "emptied": b""}.get(damage, content))
    encoded_cache._opened.cache_clear()
    calls.clear()
    again = encode_splits(rows, task, TEXT)["train"]
    assert [again[i] for i in range(60)] == whole and len(calls) == 60
    assert "damaged" in caplog.text and path.name in caplog.text
    encoded_cache._opened.cache_clear()
    assert encode_splits(rows, task, TEXT)["train"][0] == whole[0] and len(calls) == 60


def test_a_file_that_cannot_be_read_or_replaced_costs_a_warning(calls, caplog):
    task, rows = load()
    whole = encode_splits(rows, task, TEXT)["train"][3]
    (path,) = files()
    path.unlink()
    path.mkdir()  # as unreadable to root as to anybody
    encoded_cache._opened.cache_clear()
    assert encode_splits(rows, task, TEXT)["train"][3] == whole
    assert "computed again" in caplog.text and "cannot be kept" in caplog.text and path.is_dir()
    assert not list(path.parent.glob("*.part"))


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, calls, caplog):
    (tmp_path / "encoded").write_text("a file where the folder should be")
    task, rows = load()
    encoded = encode_splits(rows, task, TEXT)["train"]
    assert encoded[3] == task.encode(rows.splits["train"][3], TEXT)
    assert "cannot be kept" in caplog.text and "PARETUNE_CACHE" in caplog.text


def test_a_full_disk_costs_a_warning_and_leaves_nothing(monkeypatch, calls, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    task, rows = load()
    encoded = encode_splits(rows, task, TEXT)["train"]
    assert len(encoded[3]["input_ids"]) > 10 and len(calls) == 60, "encoded once, not again after the failure"
    assert "No space left" in caplog.text
    assert [f.suffix for f in encoded_cache.folder().iterdir()] == [".lock"]


def test_an_error_of_the_task_is_not_taken_for_the_disks(monkeypatch):
    def broken(self, row, processor):
        raise OSError("the row's file is gone")

    task, rows = load()
    monkeypatch.setattr(Classification, "encode", broken)
    with pytest.raises(OSError, match="the row's file"):
        encode_splits(rows, task, TEXT)["train"][0]


def key(task, processor=TEXT):
    return encoded_cache.recipe(task, encoded_cache.fingerprint(processor))


def test_the_name_follows_what_decides_the_content(monkeypatch):
    task, rows = load()
    same = dataclasses.replace(task, limit={"train": 3}, metric="matthews")
    assert key(task) == key(same), "which rows there are is said by their own fingerprint"
    for change in ({"max_length": 20}, {"version": 9}, {"text": ["sentence2", "sentence1"]}, {"labels": 3}):
        assert key(dataclasses.replace(task, **change)) != key(task), change
    assert key(task, ByT5Tokenizer(model_max_length=100)) != key(task)
    assert key(task, ByT5Tokenizer(model_max_length=512, extra_ids=7)) != key(task)
    other = load("rte", "task.limit={train: 61, val: 20, test: 20}")[1]
    keys = [encode_splits(r, task, TEXT) for r in (rows, other)]
    assert keys[0]["train"].key != keys[1]["train"].key and keys[0]["val"].key == keys[1]["val"].key
    monkeypatch.setattr(encoded_cache, "_version", lambda package: "0.0")
    assert key(task) != keys[0]["train"].key.split("-")[0]


def test_a_tokenizer_is_known_by_its_content(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(*words):
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", model_max_length=9)

    first = make("a", "b")
    before = encoded_cache.fingerprint(first)
    assert encoded_cache.fingerprint(make("b", "a")) != before == encoded_cache.fingerprint(make("a", "b"))
    first("a b a", truncation=True, max_length=2)
    assert encoded_cache.fingerprint(first) == before, "what a call leaves behind is no content"
    first.save_pretrained(tmp_path / "elsewhere")
    assert encoded_cache.fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path / "elsewhere")) == before


def test_truncated_rows_are_counted():
    task, rows = load("rte")
    lengths = sorted(len(task.encode(row, TEXT)["input_ids"]) for row in rows.splits["train"])
    for limit in (lengths[-1] + 1, lengths[-1], lengths[30]):
        short = dataclasses.replace(task, max_length=limit)
        assert encode_splits(rows, short, TEXT)["train"].truncated == sum(n > limit for n in lengths)
    bounded = ByT5Tokenizer(model_max_length=lengths[30])
    assert Encoded(rows.splits["train"], task, bounded).truncated == sum(n > lengths[30] for n in lengths)
    task, rows = load("gsm8k", "task.max_length=40")
    assert encode_splits(rows, task, TEXT)["train"].truncated == 60


def test_a_record_counts_truncated_rows(tmp_path):
    arguments = ["task=rte", "model=random_bert", "data=standin", "train.steps=1", "task.max_length=40", "wandb=off"]
    sizes = "task.limit={train: 20, val: 10, test: 10}"
    record = run(compose([*arguments, sizes, "method=bitfit", f"results={tmp_path}"]))
    assert record.status == "ok", record.traceback
    assert record.data["truncated"] == {"train": 20, "val": 10, "test": 10}


def test_values_that_would_not_come_back_are_refused():
    class Odd:
        kind = "classification"

        def encode(self, row, processor):
            return {"input_ids": torch.tensor([1, 2])}

    with pytest.raises(TypeError, match="input_ids of an encoded row is a Tensor"):
        encode_rows([{}], Odd(), None)


def test_the_folder_is_bounded_by_what_was_used_longest_ago(monkeypatch):
    table = pa.table({"input_ids": pa.array([[1] * 1000] * 100)})
    for name in "abc":
        encoded_cache.shared(name, lambda: table)
    size = files()[0].stat().st_size
    for age, name in enumerate("bca"):  # b was used longest ago
        os.utime(encoded_cache.folder() / f"{name}.arrow", ns=(10**18 + age, 10**18))
    encoded_cache.shared("b", lambda: pytest.fail("it is there"))
    monkeypatch.setenv("PARETUNE_ENCODED_GB", str(2.5 * size / 1e9))
    encoded_cache.shared("d", lambda: table)
    assert [f.stem for f in files()] == ["b", "d"]
    monkeypatch.setenv("PARETUNE_ENCODED_GB", str(0.5 * size / 1e9))
    encoded_cache.shared("e", lambda: table)
    assert [f.stem for f in files()] == ["e"], "the newest stays"
    monkeypatch.setenv("PARETUNE_ENCODED_GB", "0")
    encoded_cache.shared("f", lambda: table)
    assert [f.stem for f in files()] == ["e"]
    monkeypatch.setenv("PARETUNE_ENCODED_GB", "ten")
    with pytest.raises(ValueError, match="PARETUNE_ENCODED_GB='ten'"):
        encoded_cache.shared("f", lambda: table)


def test_the_command_shows_and_clears(capsys, monkeypatch):
    encoded_cache.shared("a", lambda: pa.table({"input_ids": [[1]]}))
    monkeypatch.setattr(sys, "argv", ["encoded_cache"])
    encoded_cache.main()
    assert "1 encoded splits" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["encoded_cache", "--clear"])
    encoded_cache.main()
    assert "removed" in capsys.readouterr().out and not files()


WORKER = """
import json, os, pathlib, sys, time
import pyarrow as pa
from bench import encoded_cache
def encode():
    (pathlib.Path(os.environ["PARETUNE_CACHE"]) / f"encoded_by_{os.getpid()}").touch()
    time.sleep(0.3)
    return pa.table({"input_ids": [[i, i + 1] for i in range(5000)]})
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(encoded_cache.shared("one", encode)["input_ids"].to_pylist()[-1]))
"""


def test_eight_processes_at_once_encode_once(tmp_path):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, **pipes) for _ in range(8)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    answers = [worker.communicate("go\n", timeout=60)[0] for worker in workers]
    assert [json.loads(answer) for answer in answers] == [[4999, 5000]] * 8
    assert len(list(tmp_path.glob("encoded_by_*"))) == 1
    assert [f.name for f in files()] == ["one.arrow"] and not list(encoded_cache.folder().glob(".*"))
