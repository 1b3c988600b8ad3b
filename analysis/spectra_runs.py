"""Spectra of runs: at the end of one, of finished ones from their records, and of two checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.spectra import K
from analysis.spectra_model import NO_CHANGE, curve, headline, spectra
from bench.record import Record
from methods.base import Unsupported

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from bench.config import Config
    from bench.prepare import Prepared


def store() -> Path:
    """Where the decompositions of pretrained matrices are kept, for all runs of this user."""
    from bench.registry import cache

    return cache() / "spectra"


def of_run(model: nn.Module, config: Config, folder: Path, k: int = K) -> dict[str, float | None]:
    """Write `spectra.parquet` into the run's folder; return the headline numbers.

    model: the trained one, its method applied. It is compared with the pretrained weights, since what an `Adapted` holds as
    its base may have been changed by its method (PiSSA). Layers whose change is no change of weight are left out.
    """
    table = run_table(model, config, k)
    write(table, folder / "spectra.parquet")
    return headline(table, k)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table so that a killed process leaves the old file or the new."""
    part = path.with_name(f".{path.name}")
    table.to_parquet(part, index=False)
    os.replace(part, path)


def run_table(model: nn.Module, config: Config, k: int = K) -> pd.DataFrame:
    """The table of `spectra` for a trained model of this configuration; of both models one matrix at a time is read."""
    import torch

    before, after, architecture = sides(model, config)
    device = next(model.parameters()).device
    with torch.no_grad():
        return spectra(before, after, architecture=architecture, k=k, folder=store(), device=device)


def sides(model: nn.Module, config: Config) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], str]:
    """Pretrained and effective weights of a trained model under the same names, and its architecture."""
    from analysis.spectra_model import align
    from analysis.weights import Lazy, effective, pretrained
    from bench.model import acting

    architecture: Any = model.config.model_type  # type: ignore[union-attr]
    own = effective(model)
    other = set(acting(model)) - set(own)
    before = pretrained(config, own, architecture)
    after = align(before, own)
    kept = [n for n in before if not any(n == o or n.startswith(f"{o}.") for o in other)]
    return Lazy(kept, before.__getitem__), Lazy([n for n in after if n in before], after.__getitem__), architecture


Body = Callable[[Path, Record, Any, Any], str]  # folder, record, configuration, prepared model; what to print


def each(folder: Path, body: Body, root: str | None = None, device: str = "cpu") -> str:
    """Rebuild each ok run below `folder` and give it to `body`; a line of text for each.

    A run that cannot be rebuilt gets a line that says why, and does not stop the others. Raises NoRuns where there is none.
    """
    from analysis.runs import NoRuns
    from bench.evaluate import rebuild

    own = folder / "record.json"
    paths = [own] if own.exists() else sorted(folder.glob("*/record.json"))
    records = [(path.parent, Record.load(path)) for path in paths]
    if not (ok := [(path, record) for path, record in records if record.status == "ok"]):
        raise NoRuns(
            f"{folder}: {len(paths)} records, none of them of status ok. Give the folder of runs (results=...)"
        )
    lines = []
    for path, record in ok:
        try:
            said = body(path, record, *rebuild(path, root, device))
        except (ValueError, OSError, Unsupported) as error:
            said = f"left out: {error}"
        lines.append(f"{record.id}  {record.method} {record.model} {record.task} seed {record.seed}: {said}")
    return "\n".join(lines)


def of_records(folder: Path, root: str | None = None, device: str = "cpu", k: int = K) -> str:
    """Write the spectra and headline numbers of each ok run below `folder`; a line of text for each, as `each`."""

    def body(path: Path, record: Record, config: Config, ready: Prepared) -> str:
        record.spectra = of_run(ready.model, config, path, k)
        record.save(path.parent)
        return sentence(record.spectra)

    return each(folder, body, root, device)


def of_checkpoints(base: str, tuned: str, output: Path | None = None, device: str = "cpu", k: int = K) -> str:
    """The spectra of two checkpoints as text; as JSON too (`headline`, `matrices`) where `output` is given.

    base, tuned: folders, .safetensors files or hub ids; tuned may be the folder of a `peft` adapter.
    """
    from analysis.checkpoints import open_checkpoint, open_tuned

    before = open_checkpoint(base)
    after, architecture = open_tuned(tuned, base)
    known = before.architecture or architecture
    table = spectra(before, after, architecture=known, k=k, folder=store(), device=device)
    numbers = headline(table, k)
    if output:
        rows = json.loads(table.to_json(orient="records", double_precision=10))
        about = {"base": base, "tuned": tuned, "architecture": known}
        output.write_text(json.dumps(about | {"headline": numbers, "matrices": rows}, indent=1) + "\n")
    return f"{text(table)}\n\n{sentence(numbers)}{_dtypes(table)}"


def _dtypes(table: pd.DataFrame) -> str:
    pairs = table[["dtype_base", "dtype"]].drop_duplicates()
    if pairs["dtype_base"].eq(pairs["dtype"]).all():
        return ""
    both = "; ".join(f"{a} and {b}" for a, b in pairs.itertuples(index=False))
    return f"\nnote: the two models are stored in {both}: where one was rounded, that counts as a change"


def sentence(numbers: dict[str, float | None]) -> str:
    """The headline numbers for people."""
    if not numbers["changed"]:
        return f"{NO_CHANGE} ({numbers['matrices']} matrices)"
    shown = "intruders {intruders} of the top {k} of {matrices} matrices (right {intruders_right}, as subspace "
    shown += "{intruders_window}) at epsilon {epsilon}; {share:.0%} of the matrices have one; {changed} changed"
    ranks = "; mean effective rank of the change {effective_rank:.1f}" if numbers["effective_rank"] else ""
    return (shown + ranks).format(**numbers)


def text(table: pd.DataFrame) -> str:
    """One aligned line per changed matrix."""
    from analysis.spectra import intruders

    lines = [
        f"{'matrix':44} {'shape':>11} {'intruders':>9} {'right':>5} {'lowest':>6} {'|D|/|W|':>8} {'rank':>5} {'eff.':>6}"
    ]
    for _, row in table[table["changed"]].iterrows():
        counts = f"{intruders(row['cos_left']):9} {intruders(row['cos_right']):5} {min(row['cos_left']):6.3f}"
        shape, effective = f"{row['out']}x{row['in']}", row.get("effective_rank")
        ranks = f"{row['norm_ratio']:8.1e} {row['numerical_rank']:5} {effective if effective else float('nan'):6.1f}"
        lines.append(f"{row['name'][-44:]:44} {shape:>11} {counts} {ranks}")
    return "\n".join(lines if len(lines) > 1 else [NO_CHANGE])


def curves(runs: pd.DataFrame, k: int = K) -> pd.DataFrame:
    """How many intruders each method has over epsilon: `method`, `epsilon`, `intruders` (mean over its runs), `low`, `high`, `n`.

    runs: `analysis.load(...)`; those without a spectra.parquet beside their record, or without a weight change, are left out.
    Raises ValueError where none is left.
    """
    import numpy as np
    import pandas as pd

    found = []
    for _, run in runs.iterrows():
        path = Path(run["path"]).parent / "spectra.parquet"
        if path.exists() and (table := pd.read_parquet(path))["changed"].any():
            steps = curve(table, [round(e, 2) for e in np.arange(0.05, 1, 0.05)], [k])
            found.append(steps.assign(method=run.get("label", run["method"])))
    if not found:
        raise ValueError("no run has spectra of a changed weight: python -m analysis spectra RUNS makes them")
    groups = pd.concat(found).groupby(["method", "epsilon"])["intruders"]
    return groups.agg(intruders="mean", low="min", high="max", n="size").reset_index()
