"""Every task file composes, and a tiny model can be trained and scored on its stand-in."""

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from bench.random_models import random_model
from tasks import DataConfig, compose_task, names

TEXT = ByT5Tokenizer(model_max_length=128)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr("tasks.standin.TRAIN", 300)
    monkeypatch.setattr("tasks.standin.OTHERS", 60)


def pixels(image):
    resized = np.asarray(image.resize((16, 16)), dtype=np.float32) / 255
    return {"pixel_values": [resized.transpose(2, 0, 1)]}


def small(name):
    limit = "task.limit={train: 4, val: 6, test: 2}"
    task = compose_task(name, [limit, "task.max_new_tokens=4"] if name.startswith("gsm8k") else [limit])
    return task, pixels if task.kind == "image" else TEXT


def batches(task, rows, processor, size):
    for start in range(0, len(rows), size):
        part = [rows[i] for i in range(start, min(start + size, len(rows)))]
        yield task.collate([task.encode(row, processor) for row in part], processor), part


@pytest.mark.parametrize("name", names())
def test_a_model_trains_and_is_scored(name):
    task, processor = small(name)
    kind = {"generation": "llama", "image": "vit", "classification": "bert", "choice": "llama"}[task.kind]
    model = random_model(kind, num_labels=getattr(task, "labels", 0))
    for key, value in task.options().items():
        setattr(model.config, key, value)
    rows = task.load(DataConfig("standin")).splits["val"]
    batch, _ = next(batches(task, rows, processor, 6))
    assert torch.isfinite(model(**batch).loss)
    table = task.predict(model, batches(task, rows, processor, 4), processor)
    assert list(table["row_id"]) == list(rows["row_id"])
    assert {"row_id", "label", "prediction", "score"} <= set(table)
    found = task.score(table)
    assert task.metric in found and all(np.isfinite(v) for v in found.values())


def test_unknown_keys_are_refused():
    with pytest.raises(Exception, match="lables"):
        compose_task("rte", ["task.lables=3"])
    with pytest.raises(ValueError, match="it takes pearson"):
        compose_task("stsb", ["task.metric=accuracy"])


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("6 + 1 = 7\n#### 7", "7", "7"),
        ("#### 1,234", "1234", "1234"),
        ("#### $5.00", "5", "5"),
        ("#### -3.", "-3", "-3"),
        ("so it is 1,080 dollars.", "", "1080"),
        ("no number", "", ""),
        ("#### 5\n#### 6", "5", "6"),
        ("#### ..", "", ""),
    ],
)
def test_extraction(text, strict, flexible):
    assert compose_task("gsm8k").extract(text) == (strict, flexible)


def test_batched_generation_equals_one_by_one():
    task, processor = small("gsm8k")
    model = random_model("llama")
    rows = task.load(DataConfig("standin")).splits["val"]
    together, alone = (task.predict(model, batches(task, rows, processor, n), processor) for n in (6, 1))
    assert list(together["text"]) == list(alone["text"])
    assert np.allclose(together["nll"], alone["nll"], atol=1e-5)


def test_only_the_answer_is_learned():
    task, processor = small("gsm8k")
    row = task.load(DataConfig("standin")).splits["train"][0]
    encoded = task.encode(row, processor)
    learned = [label for label in encoded["labels"] if label != -100]
    assert processor.decode(learned, skip_special_tokens=True).strip() == row["answer"]
    assert learned[-1] == processor.eos_token_id


def test_diverged_models_are_not_scored():
    task, processor = small("rte")
    model = random_model("bert")
    model.classifier.weight.data.fill_(float("nan"))
    rows = task.load(DataConfig("standin")).splits["test"]
    with pytest.raises(FloatingPointError, match="not finite"):
        task.predict(model, batches(task, rows, processor, 2), processor)
