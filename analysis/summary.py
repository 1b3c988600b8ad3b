"""Means over seeds, with intervals, of runs that differ in nothing but the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import COSTS, METRICS

BY = ("task", "model", "method")
FENCE = (
    "source",
    "settings",
    "protocol",
    "data_revision",
    "data_standin",
    "memory_kind",
    "device",
    "padding",
    "cpu",
    "software",
    "data_split",
)
UNKNOWN = {"data_revision": [], "cpu": ["device"]}  # to lack it is no difference from runs that agree in these
LEVEL = 0.95


def summarise(runs: pd.DataFrame, by: Sequence[str] = BY) -> pd.DataFrame:
    """One row per group of `by`: for the score and each cost `x`, its mean `x`, and `x_sd`, `x_low`, `x_high` over seeds.

    The interval is Student's t, 95 %: mean ± t(.975, n-1) · sd / √n, with n seeds (a bootstrap of 3 to 5 seeds would be
    far too narrow); with one seed sd and interval are missing. `n` counts seeds with a score, `missing` those without
    (failed, diverged, skipped). A seed that was run twice counts once, as its mean.

    Runs that differ in more than the seed are never averaged: a group with several configs, devices or software versions
    becomes several rows, told apart in `label` (`lora (train_lr=0.001)`).
    """
    absent = [name for name in by if name not in runs]
    if absent:
        raise ValueError(
            f"by={list(by)}: no column {absent}; the table has {', '.join(map(str, runs.columns[:12]))}, ..."
        )
    runs = runs.assign(**{name: None for name in (*FENCE, "seed", "data_fingerprint") if name not in runs})
    runs = _split_data(_fill(runs, [*by, "settings"]), by)
    keys = list(dict.fromkeys([*by, *FENCE]))
    values = [c for c in runs.columns if c in COSTS or c == "score" or c.startswith(METRICS)]
    measured = runs[[*keys, "seed", *values]].astype(dict.fromkeys(values, float))
    if "status" in runs:
        measured.loc[runs["status"] != "ok", values] = np.nan
    seeds = measured.groupby([*keys, "seed"], dropna=False, sort=False)
    groups = seeds.mean().groupby(keys, dropna=False, sort=False)
    table = _moments(groups, values).join(_counts(groups)).join(_facts(runs, keys)).copy()  # one block of columns
    table = table.reset_index()
    table.insert(len(by), "label", labels(runs, table, by))
    return table.sort_values(list(by), kind="stable", ignore_index=True)


def _fill(runs: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    """A run that failed before it knew its data or device belongs to the runs of its own settings.

    So does one of an unknown revision, and one that was not timed, where the others have but one revision, one CPU.
    """
    names = [name for name in FENCE if name not in same]
    known = runs.groupby(same, dropna=False)[names].transform("first")
    ran = runs["status"] == "ok" if "status" in runs else pd.Series(True, index=runs.index)
    for name, besides in UNKNOWN.items():
        values = runs.groupby([*dict.fromkeys([*same, *besides])], dropna=False)[name]
        only = values.transform("first").where(values.transform("nunique") == 1, None)
        runs = runs.assign(**{name: runs[name].fillna(only)})
    return runs.assign(**{name: runs[name].where(runs[name].notna() | ran, known[name]) for name in names})


def _split_data(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Name the test rows in `data_split` where runs of one group and seed were scored on different ones."""
    group = list(dict.fromkeys([*by, *(name for name in FENCE if name != "data_split")]))
    prints = runs.groupby([*group, "seed"], dropna=False)["data_fingerprint"].transform("nunique")
    most = runs.assign(prints=prints).groupby(group, dropna=False)["prints"].transform("max")
    return runs.assign(data_split=runs["data_fingerprint"].where(most > 1, None))


def _moments(groups: Any, values: list[str]) -> pd.DataFrame:
    from scipy.special import stdtrit

    mean, sd, n = groups[values].mean(), groups[values].std(), groups[values].count()
    degrees = (n - 1).where(n > 1).astype(float)
    half = stdtrit(degrees, 0.5 + LEVEL / 2) * sd / np.sqrt(n)
    parts = [mean, sd.add_suffix("_sd"), (mean - half).add_suffix("_low"), (mean + half).add_suffix("_high")]
    joined = pd.concat(parts, axis=1)
    return joined[[f"{v}{end}" for v in values for end in ("", "_sd", "_low", "_high")]]


def _counts(groups: Any) -> pd.DataFrame:
    n = groups["score"].count()
    return pd.DataFrame({"n": n, "missing": groups.size() - n})


def _facts(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Per group: the metric's name, the runs' ids, and the test rows of each seed, ((seed, fingerprint), ...)."""
    groups = runs.groupby(keys, dropna=False, sort=False)
    facts: dict[str, Any] = {}
    pairs: Any = groups[["seed", "data_fingerprint"]].apply(_pairs)  # type: ignore[call-overload]
    facts["data_fingerprints"] = pairs
    facts["ids"] = groups["id"].agg(tuple) if "id" in runs else None
    for name in ("metric", "experiment"):
        if name in runs and name not in keys:
            facts[name] = groups[name].agg(lambda c: ", ".join(sorted({v for v in c if isinstance(v, str) and v})))
    return pd.DataFrame(facts)


def _pairs(group: pd.DataFrame) -> tuple[tuple[Any, str], ...]:
    known = group[group["data_fingerprint"].notna()]
    pairs = set(zip(known["seed"].tolist(), known["data_fingerprint"].tolist(), strict=True))
    return tuple(sorted(pairs, key=str))


def labels(runs: pd.DataFrame, table: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """The method's name, and in brackets what tells apart rows of one task, model and method."""
    name = "method" if "method" in by else by[-1]
    out = table[name].astype(str).copy()
    repeated = table.duplicated(list(by), keep=False)
    for _, rows in table[repeated].groupby(list(by), dropna=False):
        facts = [_distinct(runs, row, [*by, *FENCE]) for _, row in rows.iterrows()]
        differing = [k for k in facts[0] if len({str(f.get(k)) for f in facts}) > 1]
        shown = [k for k in differing if k != "settings"] or differing
        for index, fact in zip(rows.index, facts, strict=True):
            text = ", ".join(f"{k.removeprefix('config_')}={fact[k]}" for k in shown)
            out[index] = f"{out[index]} ({text})"
    return out


def _distinct(runs: pd.DataFrame, row: pd.Series, keys: list[str]) -> dict[str, Any]:
    """The fence and the config of one summarised row, seen on its first run."""
    same = pd.Series(True, index=runs.index)
    for key in keys:
        same &= runs[key].isna() if pd.isna(row[key]) else runs[key] == row[key]
    first = runs[same].iloc[0]
    ignored = ("config_seed", "config_results", "config_name", "config_device", "config_data", "config_wandb")
    config = [c for c in runs.columns if c.startswith("config_") and not c.startswith(ignored)]
    return {k: first[k] for k in [*config, *FENCE]}
