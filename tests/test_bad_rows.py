"""Rows that are not as they should be: a sentence that says which, or a count in the record."""

import pytest
from datasets import ClassLabel, Dataset, Value

from tasks import DataConfig, MissingData, compose_task
from tests.test_data import nowhere, write_mirror  # noqa: F401  (the fixture)

REAL = DataConfig("real")


def write(tmp_path, columns, name="rte", features=None):
    """A mirror whose splits hold these columns."""
    write_mirror(tmp_path / "data", name=name)
    rows = columns if isinstance(columns, Dataset) else Dataset.from_dict(columns, features=features)
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / "data/nyu-mll/glue" / name / f"{split}-00000-of-00001.parquet")


def rte(label, first="a"):
    count = len(label)
    return {"sentence1": [first] * count, "sentence2": [f"b{i}" for i in range(count)], "label": label}


def test_an_unknown_subset_and_a_missing_split(tmp_path):
    write_mirror(tmp_path / "data", name="cola")
    with pytest.raises(MissingData, match="BuilderConfig 'rte' not found"):
        compose_task("rte").load(REAL)
    with pytest.raises(MissingData, match=r"has no split \['validation_matched'\], only \['train', 'validation'\]"):
        compose_task("cola", ["task.splits={val: validation_matched, test: validation_matched}"]).load(REAL)


def test_a_changed_schema(tmp_path):
    write(tmp_path, {"premise": ["a"] * 4, "sentence2": ["b"] * 4, "label": [0, 1, 0, 1]})
    with pytest.raises(ValueError, match=r"no column 'sentence1'; there are \['premise', 'sentence2', 'label'\]"):
        compose_task("rte").load(REAL)


def test_labels_of_another_type(tmp_path):
    write(tmp_path, rte(["yes", "no", "yes", "no"]))
    with pytest.raises(ValueError, match="the labels in 'label' are of type string, not integers"):
        compose_task("rte").load(REAL)


@pytest.mark.parametrize(
    "label, says", [([0, 1, 2, 1], "label 2, outside the 2 classes"), ([0, 1, -1, 1], "without a label")]
)
def test_labels_outside_the_set(tmp_path, label, says):
    write(tmp_path, rte(label))
    with pytest.raises(ValueError, match=says):
        compose_task("rte").load(REAL)


def test_values_that_are_no_numbers(tmp_path):
    write(tmp_path, rte([1.0, 2.0, float("nan"), 3.0]), name="stsb")
    with pytest.raises(ValueError, match="1 rows have a 'label' that is no finite number"):
        compose_task("stsb").load(REAL)


def test_empty_texts_are_kept_and_counted(tmp_path):
    write(tmp_path, rte([0, 1, 0, 1], first=" \n"))
    rows = compose_task("rte").load(REAL)
    assert rows.source["counts"]["empty"] == 8 and rows.source["rows"] == {"train": 4, "val": 2, "test": 2}


def test_missing_texts(tmp_path):
    write(tmp_path, rte([0, 1, 0, 1]) | {"sentence1": ["a", None, "b", "c"]})
    with pytest.raises(ValueError, match=r"train: 1 rows have no 'sentence1' \(null\)"):
        compose_task("rte").load(REAL)


def test_text_that_is_not_utf8(tmp_path):
    import pyarrow as pa

    raw = pa.array([b"a", b"caf\xe9", b"b", b"c"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    rest = rte([0, 1, 0, 1])
    table = pa.table({"sentence1": text, "sentence2": rest["sentence2"], "label": rest["label"]})
    write(tmp_path, Dataset(table))
    with pytest.raises(ValueError, match="'sentence1' holds text that is not UTF-8"):
        compose_task("rte").load(REAL)


def test_over_long_text_is_cut_to_the_limit():
    from tests.test_tasks import TEXT

    row = {"sentence1": "a" * 1000, "sentence2": "b", "label": 0}
    assert len(compose_task("rte", ["task.max_length=32"]).encode(row, TEXT)["input_ids"]) == 32


def test_a_reference_without_an_answer(monkeypatch):
    task = compose_task("gsm8k")
    monkeypatch.setattr(type(task), "example", lambda self, rng: {"question": str(rng.random()), "answer": "seven"})
    with pytest.raises(ValueError, match=r"no answer .* in the reference ' seven'"):
        task.load(DataConfig("standin"))


def test_class_labels_with_names_are_integers(tmp_path):
    from datasets import Features

    names = ClassLabel(names=["entailment", "not_entailment"])
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": names})
    write(tmp_path, rte([0, 1, 0, 1]), features=features)
    assert compose_task("rte").load(REAL).source["counts"] == {"empty": 0}
