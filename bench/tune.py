"""experiment=tune_*: every method gets the same trials on val; the best is recorded, and only then tested on other seeds.

A Hydra sweeper: trials are ordinary cells, run by whatever launcher is configured; what has a record is not run again, and
as each sequence of trials follows from a seed, the same command goes on where it was stopped.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from bench.record import Record, write_atomically
from bench.selection import Trial, best_file, cell_name, trials_folder, write

log = logging.getLogger("bench")
SAMPLERS = ("sobol", "random", "optuna")
RESERVED = ("test", "seed", "results", "best", "~best")  # what the sweeper itself sets


@dataclass
class TuneConf:
    """`hydra.sweeper.*` of a tuning experiment."""

    _target_: str = "hydra_plugins.paretune_tune.Tune"
    params: dict[str, Any] = field(default_factory=dict)  # the grid: method, model, task, and fixed values
    trials: int = 16  # of every cell, on the first rung
    sampler: str = "sobol"  # sobol, random, optuna
    seed: int = 0  # of the sequence of trials, and of their runs
    final_seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])  # of the tested runs; []: none
    rungs: int = 1  # successive halving: of each rung the best 1/factor go on to the next
    factor: int = 2  # and train this many times longer; the last rung trains in full
    space: dict[str, Any] = field(default_factory=dict)  # further values that are searched for every method
    best: str | None = None  # folder for the winners' files; null: conf/best


@dataclass
class Cell:
    """A method on a model and a task: its overrides, its space, its trials rung by rung."""

    name: str
    overrides: list[str]
    proposals: Any
    train: dict[str, Any]  # steps and epochs of a full training
    rungs: list[list[Trial]] = field(default_factory=list)


class Tuner(Sweeper):
    """Rounds of one trial per cell; then halving, selection, and the tested runs."""

    config: Any  # these two: set by Hydra
    launcher: Any

    def __init__(self, **conf: Any):
        plain: dict[str, Any] = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in conf.items()}
        self.conf = TuneConf(**plain)
        if self.conf.sampler not in SAMPLERS:
            raise ValueError(f"hydra.sweeper.sampler={self.conf.sampler!r}: the options are {', '.join(SAMPLERS)}")
        if self.conf.seed in self.conf.final_seeds:
            raise ValueError(f"hydra.sweeper.final_seeds holds {self.conf.seed}, the seed of the trials: give others")
        if self.conf.trials < self.conf.factor ** (self.conf.rungs - 1):
            raise ValueError(f"hydra.sweeper.trials={self.conf.trials} are too few for {self.conf.rungs} rungs")
        self.jobs = 0

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Tune every cell of the grid; returns the jobs of the tested runs."""
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        cells = [self._cell(overrides) for overrides in self._grid(arguments)]
        names = [c.name for c in cells]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"{sorted(twice)[0]} is twice in the grid: sweep method, model and task alone")
        for number in range(self.conf.trials):
            self._round(cells, [(c, Trial(c.proposals.ask())) for c in cells], rung=0, new=number == 0)
            for cell in cells:
                cell.proposals.tell(cell.rungs[0][-1].val)
        for rung in range(1, self.conf.rungs):
            going_on = [(c, Trial(t.values)) for c in cells for t in self._survivors(c.rungs[-1])]
            self._round(cells, going_on, rung=rung, new=True)
        chosen = [(cell, best) for cell in cells if (best := self._select(cell))]
        return self._launch([self._final(c, t, seed) for seed in self.conf.final_seeds for c, t in chosen])

    def _grid(self, arguments: list[str]) -> list[list[str]]:
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        overrides = parser.parse_overrides([*(f"{k}={v}" for k, v in self.conf.params.items()), *arguments])
        for override in overrides:
            key = override.get_key_element()
            if key in ("test", "seed") or (key == "results" and override.is_sweep_override()):
                raise ValueError(
                    f"{key} is set by tuning itself: trials have hydra.sweeper.seed and never see the test split"
                )
        return BasicSweeper.split_arguments([o for o in overrides if o.get_key_element() not in RESERVED], None)[0]

    def _cell(self, overrides: list[str]) -> Cell:
        from bench.space import Proposals, space

        cfg = self.context.config_loader.load_sweep_config(self.config, [*overrides, "~best"])
        fixed = [o.partition("=")[0] for o in overrides] + ["train.lr"] * (cfg.train.lr is not None)
        dimensions = space(OmegaConf.to_object(cfg.method), self.conf.space, fixed)
        if not dimensions:
            raise ValueError(f"{' '.join(overrides)}: everything that could be tuned is set already")
        proposals = Proposals(dimensions, self.conf.trials, self.conf.sampler, self.conf.seed)
        train = {k: cfg.train[k] for k in ("steps", "epochs")}
        return Cell(cell_name(cfg.hydra.runtime.choices), overrides, proposals, train)

    def _round(self, cells: list[Cell], trials: list[tuple[Cell, Trial]], *, rung: int, new: bool) -> None:
        """Run trials, one job each, and put them on their cells' rung."""
        if new:
            for cell in cells:
                cell.rungs.append([])
        found = self._records([self._trial(cell, trial, rung) for cell, trial in trials])
        for (cell, trial), record in zip(trials, found, strict=True):
            trial.record = record
            cell.rungs[rung].append(trial)

    def _trial(self, cell: Cell, trial: Trial, rung: int) -> list[str]:
        share = self.conf.factor ** (self.conf.rungs - 1 - rung)  # this rung trains 1/share of the whole
        length = {"train.steps": max(1, round(cell.train["steps"] / share))} if cell.train["steps"] else {}
        length = length or {"train.epochs": cell.train["epochs"] / share}
        values = trial.values | (length if share > 1 else {})
        where = trials_folder(self.config.results)
        return [
            *cell.overrides,
            "~best",
            *[f"{k}={v}" for k, v in values.items()],
            "test=locked",
            f"seed={self.conf.seed}",
            f"results='{where}'",
        ]

    def _final(self, cell: Cell, best: Trial, seed: int) -> list[str]:
        results = f"results='{self.config.results}'"
        return [
            *cell.overrides,
            "~best",
            *[f"{k}={v}" for k, v in best.values.items()],
            "test=selected",
            f"seed={seed}",
            results,
        ]

    def _records(self, jobs: list[list[str]]) -> list[Record]:
        """Run jobs and wait for those that another worker computes; a signal ends the sweep with exit code 130."""
        words = [job.return_value for job in self._launch(jobs)]
        while any(word.startswith("running: ") for word in words):
            _wait([Path(word.removeprefix("running: ")) for word in words if word.startswith("running: ")])
            words = [job.return_value for job in self._launch(jobs)]  # what has a record returns at once
        records = [_record(word) for word in words]
        if any(r is None or r.status == "interrupted" for r in records):
            raise SystemExit(130)
        return [r for r in records if r is not None]

    def _launch(self, jobs: list[list[str]]) -> list[Any]:
        if not jobs:
            return []
        returns = list(self.launcher.launch(jobs, initial_job_idx=self.jobs))
        self.jobs += len(jobs)
        return returns

    def _survivors(self, rung: list[Trial]) -> list[Trial]:
        """The best 1/factor of a rung, in the order in which they were tried; ties: the earlier."""
        ranked = sorted(rung, key=lambda t: -float("inf") if t.val is None else t.val, reverse=True)
        kept = {id(t) for t in ranked[: max(1, len(rung) // self.conf.factor)]}
        return [t for t in rung if id(t) in kept]

    def _select(self, cell: Cell) -> Trial | None:
        """Record the best trial of the last rung and write its values for later runs; None where none ended well."""
        ended = [t for t in cell.rungs[-1] if t.val is not None]
        if not ended:
            reasons = {t.record.reason for t in cell.rungs[-1] if t.record is not None}
            log.warning("%s: no trial ended well, nothing is chosen: %s", cell.name, "; ".join(sorted(reasons)))
            return None
        best = max(ended, key=lambda t: float(t.val or 0.0))
        selection = self._selection(cell, best)
        write(self.config.results, cell.name, selection)
        path = _best_folder(self.conf.best) / f"{cell.name}.yaml"
        write_atomically(path, best_file(selection, self._command()))
        log.info("%s: %s = %.4f on val with %s: %s", cell.name, selection["metric"], best.val, best.values, path)
        return best

    def _selection(self, cell: Cell, best: Trial) -> dict[str, Any]:
        rows = [_row(t, rung) for rung, trials in enumerate(cell.rungs) for t in trials]
        assert best.record is not None
        return {
            "cell": cell.name,
            "values": best.values,
            "winner": best.record.id,
            "metric": best.record.metric,
            "val": best.val,
            "sampler": self.conf.sampler,
            "seed": self.conf.seed,
            "rungs": self.conf.rungs,
            "steps": sum(row["steps"] or 0 for row in rows),
            "task": best.record.task,  # "rte (stand-in)" where the rows were generated
            "trials": rows,
        }

    def _command(self) -> str:
        chosen = OmegaConf.select(self.config, "hydra.runtime.choices.experiment")
        return f"python -m bench experiment={chosen}" if chosen else "python -m bench hydra/sweeper=tune"


def _row(trial: Trial, rung: int) -> dict[str, Any]:
    r = trial.record
    assert r is not None
    return {"id": r.id, "rung": rung, "status": r.status, "val": trial.val, "steps": r.steps, "values": trial.values}


def _record(word: str) -> Record | None:
    """The record that a job left word of; None where a signal came before it. Raises ValueError for one that cannot be run."""
    if word.startswith("error: "):
        raise ValueError(word.removeprefix("error: "))
    return None if word.startswith("stopped: ") else Record.load(Path(word))


def _wait(folders: list[Path], seconds: float = 60.0) -> None:
    """Until all have records, or so long: a worker may have died, then the next launch takes its cell over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all((f / "record.json").exists() for f in folders):
        time.sleep(1.0)


def _best_folder(folder: str | None) -> Path:
    from bench.config import CONF

    return Path(folder) if folder else CONF / "best"


ConfigStore.instance().store(group="hydra/sweeper", name="tune", node=TuneConf, provider="paretune")
