"""WiC, MultiRC and ReCoRD: inputs, groups that stay together, and SuperGLUE's own metrics."""

import pandas as pd
import pytest
import sklearn.metrics as reference
import torch
from transformers import ByT5Tokenizer

from bench.random_models import random_model
from tasks import DataConfig, compose_task
from tests.test_tasks import batches

TEXT = ByT5Tokenizer(model_max_length=512)
STANDIN = DataConfig("standin")


def test_wic_reads_the_word_with_the_sentences():
    task = compose_task("wic")
    ids = task.encode({"word": "bank", "sentence1": "a", "sentence2": "b", "label": 1}, TEXT)["input_ids"]
    assert TEXT.decode(ids, skip_special_tokens=True).replace("\n", "") == "bank: ab"
    assert task.columns() == ["word", "sentence1", "sentence2", "label"]


def test_options_of_a_paragraph_are_in_one_split():
    rows = compose_task("multirc", ["task.limit={val: 50}"]).load(STANDIN)
    paragraphs = {s: {i["paragraph"] for i in rows.splits[s]["idx"]} for s in ("val", "test")}
    assert not paragraphs["val"] & paragraphs["test"]
    assert 20 <= len(rows.splits["val"]) <= 50 and "idx.paragraph" in rows.source["protocol"]
    whole = compose_task("multirc").load(STANDIN).splits["val"]
    counts = pd.Series([i["question"] for i in whole["idx"]]).value_counts()
    kept = pd.Series([i["question"] for i in rows.splits["val"]["idx"]]).value_counts()
    assert (counts[kept.index] == kept).all(), "a limit tears no question"


def test_multirc_metrics():
    task = compose_task("multirc")
    table = pd.DataFrame({
        "question": ["0/0", "0/0", "0/1", "0/1", "1/2"],
        "label": [1, 0, 1, 1, 0],
        "prediction": [1, 0, 1, 0, 0],
    })  # fmt: skip
    found = task.score(table)
    assert found["exact_question"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(reference.f1_score(table["label"], table["prediction"]))
    each = [1.0, 2 / 3, 0.0]  # no option right and none chosen: 0, as in scikit-learn
    assert found["f1_question"] == pytest.approx(sum(each) / 3)
    assert task.metric == "f1" and found["accuracy"] == 0.8


def test_cb_has_macro_f1_beside_accuracy():
    task = compose_task("cb")
    table = pd.DataFrame({"label": [0, 1, 2, 2], "prediction": [0, 1, 1, 2]})
    assert task.score(table)["f1"] == pytest.approx(
        reference.f1_score(table["label"], table["prediction"], average="macro")
    )


ROW = {
    "row_id": 3, "passage": "p", "query": "@placeholder won.", "entities": ["Ann Lee", "The Ann", "Bob"],
    "answers": ["Ann", "ann lee"],
}  # fmt: skip


def test_record_takes_each_of_the_right_answers():
    task = compose_task("record")
    assert task.options_of(ROW) == ["Ann Lee won.", "The Ann won.", "Bob won."]
    assert task.gold(ROW) == 0
    lines = [task._line(ROW, task.options_of(ROW), likely) for likely in ([0.0, -1, -1], [-1, 0.0, -1], [-1, -1, 0.0])]
    assert [line["label"] == line["prediction"] for line in lines] == [True, True, False]
    assert [line["token_f1"] for line in lines] == [1.0, 1.0, 0.0]
    found = task.score(pd.DataFrame(lines))
    assert found["accuracy"] == found["token_f1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="row 3: none of answers"):
        task.gold(ROW | {"answers": ["Carl"]})


def test_record_learns_the_sentence_with_a_right_answer():
    task = compose_task("record")
    learned = [label for label in task.encode(ROW, TEXT)["labels"] if label != -100]
    assert TEXT.decode(learned) == "Ann Lee won."
    rows = task.load(STANDIN).splits
    passages = {s: set(rows[s]["passage"]) for s in ("val", "test")}
    assert not passages["val"] & passages["test"]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "deberta"])
@pytest.mark.parametrize("name", ["wic", "multirc"])
def test_encoders_and_decoders_are_trained_and_scored(name, kind):
    task = compose_task(name, ["task.limit={train: 4, val: 6, test: 2}", "task.max_length=64"])
    model = random_model(kind, model_class=task.model_class)
    model.config.pad_token_id = TEXT.pad_token_id
    rows = task.load(STANDIN).splits["val"]
    batch, _ = next(batches(task, rows, TEXT, 6))
    assert torch.isfinite(model(**batch).loss)
    found = task.score(task.predict(model, batches(task, rows, TEXT, 4), TEXT))
    assert task.metric in found and ("exact_question" in found) == (name == "multirc")
