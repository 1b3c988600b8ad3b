"""`hydra/launcher=fused`: the jobs of a sweep in one process, those that share a backbone trained at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger("bench")
OWN = ("lr", "weight_decay", "schedule", "warmup", "clip", "patience", "epochs", "steps", "eval_every", "select")
SHARED = ("model", "task", "data", "device", "threads", "results")


class FusedLauncher(Launcher):
    """Runs jobs whose `kin` is the same together, up to `runs` at once; the others in turn, each with a line that says why.

    timed: measure on the first batches how many at once cost the least, which may be none; else always all.
    processes: that share `runs` among them, each with `threads`, or else its part of torch's; null: what `_processes` finds.
    """

    def __init__(self, runs: int = 8, timed: bool = True, processes: int | None = None):
        if runs < 1 or (processes is not None and processes < 1):
            raise ValueError(f"hydra.launcher.runs={runs} and hydra.launcher.processes={processes} must be at least 1")
        self.runs, self.timed, self.processes = runs, timed, processes
        self.computed = False  # here: what is forked from now on could wait for ever for this process's threads

    def setup(self, *, hydra_context: Any, task_function: Callable[..., Any], config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.load = hydra_context.config_loader.load_sweep_config
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        hydra_context.config_loader.load_sweep_config = self._compose

    def _compose(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """A job's configuration, kept: Hydra's sweeper has all composed, to see that they can be, before they are launched."""
        found = self.composed[tuple(sweep_overrides)] = self.load(master_config, sweep_overrides)
        return found

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, team by team; what each returned, in their order."""
        setup_globals()
        self._log_of_the_sweep()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = [self._job(list(o), initial_job_idx + k) for k, o in enumerate(job_overrides)]
        found: dict[int, JobReturn] = {}
        groups = teams([kin(job) for job in jobs], self.runs)
        counts = [1 if self.computed else self.processes or _processes(jobs[team[0]], len(team)) for team in groups]
        self.computed = max(counts) == 1
        for team, count in zip(groups, counts, strict=True):
            for k in team:
                log.info("#%d : %s", initial_job_idx + k, " ".join(filter_overrides(job_overrides[k])))
            if len(team) == 1:
                log.info("not fused: no other job has its method, model, task and batches")
            found |= self._spread({k: jobs[k] for k in team}, count, fork=not self.computed)
            self._log_of_the_sweep()
        return [found[k] for k in range(len(jobs))]

    def _job(self, overrides: list[str], number: int) -> DictConfig:
        kept = self.composed.pop(tuple(overrides), None)
        job = self.load(self.config, overrides) if kept is None else kept
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        return job

    def _spread(self, jobs: dict[int, DictConfig], count: int, *, fork: bool) -> dict[int, JobReturn]:
        """What each job returned; in `count` processes at the same time, or all in this one.

        A process's threads are written into its jobs' configurations: they decide the last bits of a run.
        """
        import torch

        from bench.fused_processes import apart, split

        parts = split([*jobs], count)
        given = [[jobs[k] for k in part] for part in parts]
        for job in jobs.values() if len(parts) > 1 else ():
            with open_dict(job):
                job.threads = job.threads or max(1, torch.get_num_threads() // len(parts))

        def body(part: list[DictConfig]) -> list[JobReturn]:
            if part[0].threads:
                torch.set_num_threads(part[0].threads)
            return self._together(part)

        returned = apart(given, body) if fork else [body(part) for part in given]
        return {k: job for part, found in zip(parts, returned, strict=True) for k, job in zip(part, found, strict=True)}

    def _together(self, jobs: list[DictConfig]) -> list[JobReturn]:
        """One thread each, where there is more than one; signals reach all of them."""
        from bench.fused import Team
        from bench.train import handling

        bodies = [partial(self._run, job) for job in jobs]
        if len(bodies) == 1:
            return [bodies[0]()]
        team = Team([(_hydra, _set_hydra), (_handlers, _set_handlers)], timed=self.timed)
        with handling(team.signal):
            return team.run(bodies)

    def _run(self, job: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _log_of_the_sweep(self) -> None:
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)


def kin(job: DictConfig) -> str:
    """What jobs must have in common to be trained together: all but the seed, what a method is set to, and `OWN` of train."""
    own = {k: v for k, v in OmegaConf.to_container(job, resolve=False).items() if k != "hydra"}  # type: ignore[union-attr]
    kept: dict[str, Any] = {k: own.get(k) for k in SHARED}
    kept["train"] = {k: v for k, v in own["train"].items() if k not in OWN}  # type: ignore[union-attr, index]
    kept["method"] = str(job.hydra.runtime.choices.method)
    return json.dumps(kept, sort_keys=True, default=str)


def _processes(job: DictConfig, runs: int) -> int:
    """On a CPU as many as have four runs, and a core for each thread that `threads` asks for, which is one; a GPU has one."""
    import torch

    on_cpu = job.device == "cpu" or (job.device == "auto" and not torch.cuda.is_available())
    return max(1, min(torch.get_num_threads() // (job.threads or 1), runs // 4)) if on_cpu else 1


def teams(kins: Sequence[str], most: int) -> list[list[int]]:
    """Indices of jobs of one kin, up to `most` together, in the order of the first of each."""
    found: dict[str, list[list[int]]] = {}
    for k, name in enumerate(kins):
        groups = found.setdefault(name, [[]])
        if len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(k)
    return sorted((g for groups in found.values() for g in groups), key=lambda g: g[0])


def _hydra() -> Any:
    return HydraConfig.instance().cfg


def _set_hydra(value: Any) -> None:
    HydraConfig.instance().cfg = value


def _handlers() -> list[logging.Handler]:
    return [*logging.getLogger().handlers]


def _set_handlers(value: list[logging.Handler]) -> None:
    logging.getLogger().handlers[:] = value
