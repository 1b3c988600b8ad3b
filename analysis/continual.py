"""Continual learning: tasks one after the other, each change merged, the next one starting anew on what was left.

Shuttleworth et al. 2024, https://arxiv.org/abs/2410.21228: after each stage only the heads are trained again to test every
task. Stages and tests are ordinary runs with records of their own (selection on val; the method `linear_probe` trains the
heads), so that a stopped chain goes on and nothing is trained twice. `intruders` count against the stage's own start,
`intruders_total` against the first pretrained model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.config import Config, compose
from bench.record import Record
from methods.base import Adapted, Unsupported

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from bench.prepare import Prepared

PROBE = "linear_probe"


def chain(tasks: Sequence[str], overrides: Sequence[str], results: Path) -> pd.DataFrame:
    """Train `tasks` in order with what `overrides` say (as for `python -m bench`); one row per stage and tested task.

    Columns: `stage` (0: pretrained), `trained` (its task), `task`, `score` (test, its head trained anew), `val`, `intruders`,
    `intruders_total`. Raises ValueError where a run is not ok, Unsupported for a change that cannot be merged.
    """
    import pandas as pd

    first, folder, done = None, None, list[str]()
    rows: list[dict[str, Any]] = []
    for stage, task in enumerate([None, *tasks]):
        about: dict[str, Any] = {"stage": stage, "trained": task}
        if task is not None:
            config = _config(task, [*overrides, "spectra=true", "save_state=true"], results, folder, done)
            first = first or config.model
            record = _run(config)
            folder, total = _merged(results / record.id, first)
            done.append(task)
            about |= {
                "trained": record.task,
                "record": record.id,
                "intruders": record.spectra["intruders"],
                "intruders_total": total,
            }
        for other in tasks:
            found = _run(_config(other, _probing(overrides), results, folder, done))
            val = found.metrics[f"val/{found.metric}"]
            rows.append(about | {"task": found.task, "metric": found.metric, "score": found.score, "val": val})
    return pd.DataFrame(rows)


def _probing(overrides: Sequence[str]) -> list[str]:
    """The same runs, but for what belongs to the method."""
    own = ("method", "train.lr", "spectra", "forgetting")
    return [o for o in overrides if not o.lstrip("+~").startswith(own)] + [f"method={PROBE}"]


def _config(task: str, overrides: Sequence[str], results: Path, folder: Path | None, done: Sequence[str]) -> Config:
    config = compose([*overrides, f"task={task}", f"results={results}"])
    if folder is not None:
        config.model = dataclasses.replace(config.model, path=str(folder))
        config.choices["model"] += f" after {', '.join(done)}"  # no table may take it for the pretrained one
    return config


def _run(config: Config) -> Record:
    from bench.run import run

    record = run(config)
    if record.status != "ok":
        raise ValueError(f"{record.method} on {record.task} is {record.status}: {record.reason}")
    return record


def _merged(path: Path, first: Any) -> tuple[Path, int | None]:
    """The folder of the merged backbone of a finished stage, and its intruders against the model `first`."""
    from analysis.spectra_model import headline
    from analysis.spectra_runs import run_table
    from bench.evaluate import rebuild

    config, ready = rebuild(path)
    total: Any = headline(run_table(ready.model, dataclasses.replace(config, model=first)))["intruders"]
    return save_merged(ready, path / "merged"), total


def save_merged(ready: Prepared, folder: Path) -> Path:
    """Fold the change into the weights and write them for `model.path=FOLDER`, without a head that the task brought.

    Raises Unsupported where something beside the weights is left.
    """
    from bench.model import merge

    merge(ready.model)
    if left := [n for n, m in ready.model.named_modules() if isinstance(m, Adapted)]:
        raise Unsupported(f"the change cannot be merged into the weights ({left[0]}), so no next stage can start on it")
    whole: Any = ready.model
    model = whole.base_model if ready.source["head"] else whole
    model.save_pretrained(folder, state_dict=_stored(model))
    ready.processor.save_pretrained(folder)
    return folder.absolute()


def _stored(model: nn.Module) -> dict[str, Any]:
    """The state dict as checkpoints have it: GPT-2's layers, which are built as linear ones, lie there transposed."""
    from analysis.checkpoints import CONV1D

    state = model.state_dict()
    turned = model.config.model_type == "gpt2"  # type: ignore[union-attr]
    return {n: t.T.contiguous() if turned and CONV1D.search(n.removesuffix(".weight")) else t for n, t in state.items()}


def average_forgetting(table: pd.DataFrame) -> float:
    """Mean over all tasks but the last of the best score since its training, less the last one (Chaudhry et al. 2018)."""
    last = int(table["stage"].max())
    trained = table.dropna(subset="trained").groupby("trained")["stage"].first()
    losses = []
    for task, stage in trained[trained < last].items():
        scores = table[(table["task"] == task) & (table["stage"] >= stage)].set_index("stage")["score"]
        losses.append(scores.max() - scores[last])
    return float(sum(losses) / len(losses)) if losses else float("nan")


def text(table: pd.DataFrame) -> str:
    """The matrix of scores, a line per stage, with its intruders."""
    wide = table.pivot(index="stage", columns="task", values="score")[list(dict.fromkeys(table["task"]))]
    stages = table.drop_duplicates("stage").set_index("stage")
    wide.insert(0, "trained", stages["trained"].fillna("(pretrained)"))
    wide = wide.join(stages.reindex(columns=["intruders", "intruders_total"]))
    shown = wide.to_string(float_format=lambda x: f"{x:.4g}", na_rep="–")
    return f"{shown}\ntest scores, heads trained anew; average forgetting {average_forgetting(table):.4f}"


def command(results: Path, tasks: Sequence[str], overrides: Sequence[str]) -> str:
    """Run the chain, write `continual.parquet` beside the last stage's record; the matrix as text."""
    from analysis.spectra_runs import write

    if len(tasks) < 2:
        raise ValueError(f"--tasks {','.join(tasks)}: give two tasks or more, comma-separated, in order")
    table = chain(tasks, overrides, results)
    path = results / table["record"].dropna().iloc[-1] / "continual.parquet"
    write(table, path)
    return f"{text(table)}\n{path}"
