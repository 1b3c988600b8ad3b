"""Results of other projects in the table shape of `analysis.load`; the column `source` says whose they are.

- huggingface/peft `method_comparison`: one JSON file per experiment, beside each other in a folder.
- OSU-MLB/ViT_PEFT_Vision on VTAB-1k (arXiv 2409.16434): `vtab1k_selected.csv` and `vtab1k_grid_summary.csv`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import checked

PEFT, OSU = "huggingface/peft method_comparison", "OSU-MLB/ViT_PEFT_Vision"
SELECTED, GRIDS = "vtab1k_selected.csv", "vtab1k_grid_summary.csv"
UNKNOWN_BYTES = 99_999_999  # what the peft project writes where a file could not be measured
TEST_ROWS = {"MetaMathQA": 1319}  # GSM8K's test split
BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, RecursionError)
_COLUMNS: tuple[str, ...] = ("dataset", "group", "method", "grid_size", "hyper_parameters", "inserted_parameters")
_COLUMNS += ("val200_top1", "test_top1_final_epoch", "test_top1_best_epoch")
_STATUS = {"success": "ok", "failed": "failed", "canceled": "interrupted", "running": "interrupted"}


def peft_results(folder: str | Path) -> pd.DataFrame:
    """One row per result file of `method_comparison/<task>/results`.

    `method` is `family/experiment` without the model's name. The score is the test metric of the last step. `memory_peak`
    is the largest *reserved* memory of the process (`memory_kind` says so), `time_train` the sum of the step times; the
    project's own `train_time` also holds tokenisation and test generation.
    """
    return _as_table(Path(folder), _peft_rows)


def vtab_selected(folder: str | Path) -> pd.DataFrame:
    """One row per data set and method of `vtab1k_selected.csv`: the configuration that val200 chose, one seed.

    `score` is the test accuracy of the last epoch, `metrics_best_test/accuracy` that of the best epoch *on the test set*
    (for measuring optimism only), `metrics_val/accuracy` the winner's accuracy on val200; all in [0, 1].
    """
    return _as_table(Path(folder), _vtab_rows)


def vtab_grids(folder: str | Path) -> pd.DataFrame:
    """Order statistics of val200 accuracy over each grid, in [0, 1]: task, method, trials, val_*, e_best_1 ... e_best_16."""
    path = Path(folder) / GRIDS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder that holds {GRIDS} and {SELECTED}")
    try:
        table = _csv(path, "dataset", "method", "grid_size").rename(columns={"dataset": "task", "grid_size": "trials"})
        values = [c for c in table.columns if c.startswith(("val_", "e_best_"))]
        return table.assign(**{c: table[c].astype(float) / 100 for c in values}, trials=table["trials"].astype(int))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _csv(path: Path, *needed: str) -> pd.DataFrame:
    """A table of texts, so that one broken cell leaves the others of its column what they are."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if absent := [name for name in needed if name not in table]:
        raise ValueError(f"no column {', '.join(absent)}; there are {', '.join(map(str, table.columns[:12]))}")
    return table


def foreign_rows(folder: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The rows of every file in `folder` that one of the importers reads, and (path, problem) of what they cannot read."""
    rows, problems = _peft_rows(folder)
    more, others = _vtab_rows(folder)
    return rows + more, problems + others


def _as_table(folder: Path, read: Any) -> pd.DataFrame:
    from analysis.runs import NoRuns, table_of

    rows, problems = read(folder)
    if not rows:
        raise NoRuns(
            f"{folder}: holds no file of this kind that can be read; {len(problems)} could not: {problems[:3]}"
        )
    return table_of(rows, problems)


def _peft_rows(folder: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    rows, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if isinstance(content, dict) and {"run_info", "train_info", "meta_info"} <= content.keys():
                rows.append(checked(_peft_row(content, path)))
        except BROKEN as error:
            problems.append((str(path), f"{type(error).__name__}: {error}"))
    return rows, problems


def _peft_row(content: dict[str, Any], path: Path) -> dict[str, Any]:
    run, train, meta = content["run_info"], content["train_info"], content["meta_info"]
    config = run["train_config"]
    model = str(config["model_id"]).rpartition("/")[2]
    family, _, name = str(run["experiment_name"]).partition("/")
    task = "image-gen" if any("dino" in key for key in _last(train)) else "MetaMathQA"
    status = _STATUS.get(train["status"], "failed")
    return {
        "id": f"{family}/{name}",
        "method": f"{family}/{_without(name, model)}",
        "family": family,
        "model": model,
        "task": task,
        "seed": config["seed"],
        "status": status,
        "reason": run.get("error_msg") or "",
        "experiment": run.get("peft_branch"),
        **_peft_scores(train),
        **_peft_costs(run, train),
        **{f"config_train_{k}": v for k, v in _plain(config).items()},
        **{f"config_method_{k}": v for k, v in _plain(run.get("peft_config") or {}).items()},
        **_peft_origin(config, meta, task),
        "settings": _hash({"train": config, "method": run.get("peft_config")}, without="seed"),
        "path": str(path),
    }


def _without(name: str, model: str) -> str:
    return name[len(model) :].lstrip("-") if name.lower().startswith(model.lower()) else name


def _last(train: dict[str, Any]) -> dict[str, Any]:
    metrics = train.get("metrics") or [{}]
    return metrics[-1]


def _peft_scores(train: dict[str, Any]) -> dict[str, Any]:
    """The test metrics of the last step; val at the last evaluation before."""
    found = {k.removeprefix("test "): v for k, v in _last(train).items() if k.startswith("test ")}
    metric = "accuracy" if "accuracy" in found else next(iter(found), "")
    vals = [m[f"valid {metric}"] for m in train.get("metrics") or () if f"valid {metric}" in m]
    numbers = {f"metrics_test/{k}": v for k, v in found.items()} | {"metrics_val/" + metric: vals[-1] if vals else None}
    numbers["metrics_test/forgetting"] = _last(train).get("forgetting")
    numbers["metrics_train/loss"] = _last(train).get("train loss")
    return {"metric": metric, "score": found.get(metric), "steps": _last(train).get("step"), **numbers}


def _peft_costs(run: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    parts = [m for m in train.get("metrics") or () if "train time" in m]
    steps = np.diff([0, *(m["step"] for m in parts)])
    seconds = np.array([m["train time"] for m in parts], float)
    size = train.get("file_size")
    return {
        "trained_params": train.get("num_trainable_params"),
        "total_params": train.get("num_total_params"),
        "stored_bytes": None if size == UNKNOWN_BYTES else size,
        "memory_peak": train.get("accelerator_memory_max", train.get("cuda_memory_max")),
        "time_step": float(np.median(seconds / steps)) if len(parts) else None,
        "time_train": float(seconds.sum()) if len(parts) else None,
        "time_eval": float(sum(m.get("eval time", 0.0) for m in parts)) if len(parts) else None,
        "time_total": run.get("total_time"),
    }


def _peft_origin(config: dict[str, Any], meta: dict[str, Any], task: str) -> dict[str, Any]:
    data = {name: info.get("sha") for name, info in (meta.get("dataset_info") or {}).items()}
    packages = meta.get("package_info") or {}
    versions = {k.removesuffix("-version"): v for k, v in packages.items() if k.endswith("-version") and v}
    steps, size = config.get("max_steps"), config.get("batch_size")
    return {
        "source": PEFT,
        "protocol": f"{task} of method_comparison, {steps} steps of {size}, test at the last step",
        "device": (meta.get("system_info") or {}).get("accelerator"),
        "memory_kind": "largest reserved memory of the process",
        "software": ", ".join(f"{k} {v}" for k, v in sorted(versions.items())),
        "data_revision": ", ".join(f"{k} {v}" for k, v in sorted(data.items())),
        "data_rows_test": TEST_ROWS.get(task),
        "data_standin": False,
    }


def _vtab_rows(folder: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    path = folder / SELECTED
    rows: list[dict[str, Any]] = []
    problems: list[tuple[str, str]] = []
    try:
        lines = _csv(path, *_COLUMNS).to_dict("records") if path.is_file() else []
    except BROKEN as error:
        return [], [(str(path), f"{type(error).__name__}: {error}")]
    for number, line in enumerate(lines, 2):
        try:
            rows.append(checked(_vtab_row(line, path)))
        except BROKEN as error:
            problems.append((str(path), f"line {number}: {type(error).__name__}: {error}"))
    return rows, problems


def _number(text: str) -> float | None:
    return float(text) if text else None


def _share(text: str) -> float | None:
    return float(text) / 100 if text else None


def _vtab_row(row: dict[Any, Any], path: Path) -> dict[str, Any]:
    config = json.loads(row["hyper_parameters"])
    score = _share(row["test_top1_final_epoch"])
    own = {k: v for k, v in config.items() if k not in ("lr", "wd")}
    return {
        "id": f"{row['dataset']}/{row['method']}",
        "task": row["dataset"],
        "group": row["group"],
        "model": "vit_b16_in21k",
        "method": row["method"],
        "seed": 42,
        "status": "ok",
        "metric": "accuracy",
        "score": score,
        "metrics_test/accuracy": score,
        "metrics_val/accuracy": _share(row["val200_top1"]),
        "metrics_best_test/accuracy": _share(row["test_top1_best_epoch"]),
        "trained_params": _number(row["inserted_parameters"]),
        "trials": _number(row["grid_size"]),
        "config_train_lr": config["lr"],
        "config_train_weight_decay": config["wd"],
        **{f"config_method_{k}": v for k, v in own.items()},
        "source": OSU,
        "protocol": "VTAB-1k, chosen on val200, retrained on 1,000, last epoch",
        "data_standin": False,
        "settings": _hash(config),
        "path": str(path),
    }


def _plain(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `outer_inner`; a list stays one cell, as JSON."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= _plain(value, f"{prefix}{key}_")
        else:
            out[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return out


def _hash(config: dict[str, Any], without: str = "") -> str:
    kept = {k: ({i: v for i, v in c.items() if i != without} if isinstance(c, dict) else c) for k, c in config.items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
