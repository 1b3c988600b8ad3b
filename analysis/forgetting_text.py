"""Texts like those of pretraining, on which forgetting is measured, and where they came from."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from typing import Any

from tasks.data import DataConfig, MissingData

WORDS = 60  # of a text, at least: enough tokens for one row with any tokenizer


@dataclass(frozen=True)
class Text:
    """One column of a public data set."""

    path: str
    name: str
    split: str
    column: str
    licence: str


TEXTS = {
    "wikipedia": Text("aps/super_glue", "boolq", "train", "passage", "CC BY-SA 3.0"),  # BoolQ's passages
    "wikitext": Text("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "CC BY-SA 4.0"),
    "reviews": Text("stanfordnlp/imdb", "plain_text", "test", "text", "authors' terms, research use"),
}
OFFLINE = "python"  # the language reference that every Python brings


def texts(data: DataConfig, count: int, wanted: str | None = None, avoid: str = "") -> tuple[list[str], dict[str, Any]]:
    """`count` different texts of at least WORDS words, and their source for the record.

    wanted: a name of TEXTS or "python"; None: "wikipedia", or Python's reference where `data.mode` is standin or Wikipedia
    cannot be had (never where it is real). avoid: the data set that the model was tuned on, whose text is no yardstick.
    Raises MissingData, and ValueError for an unknown name.
    """
    if wanted not in (None, OFFLINE, *TEXTS):
        raise ValueError(f"text {wanted!r} does not exist; there are {', '.join([*TEXTS, OFFLINE])}")
    if wanted == OFFLINE or (wanted is None and data.mode == "standin"):
        return _python(count)
    text = TEXTS[wanted or ("reviews" if TEXTS["wikipedia"].path == avoid else "wikipedia")]
    try:
        return _public(text, data, count)
    except MissingData:
        if wanted or data.mode == "real":
            raise
    return _python(count)


def _public(text: Text, data: DataConfig, count: int) -> tuple[list[str], dict[str, Any]]:
    from tasks.classification import Classification
    from tasks.data import public

    task = Classification(path=text.path, name=text.name, splits={"train": text.split}, text=[text.column])
    found = public(task, DataConfig("real", data.root))
    rows = found.splits[text.split]
    source = {"text": f"{text.path} {text.name} {text.column}", "licence": text.licence, "from": found.source["kind"]}
    return _chosen((row[text.column] for row in rows), count, source)


def _python(count: int) -> tuple[list[str], dict[str, Any]]:
    from pydoc_data.topics import topics

    source = {"text": f"language reference of Python {platform.python_version()}", "licence": "PSF-2.0"}
    paragraphs = (p for topic in sorted(topics) for p in topics[topic].split("\n\n"))
    return _chosen(paragraphs, count, source | {"from": "the installation"})


def _chosen(found: Any, count: int, source: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    kept: dict[str, None] = {}
    for text in (" ".join(t.split()) for t in found):
        if len(text.split()) >= WORDS:
            kept[text] = None
        if len(kept) == count:
            break
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]
    return list(kept), source | {"fingerprint": digest, "texts": len(kept)}
