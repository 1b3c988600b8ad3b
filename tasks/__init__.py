"""Tasks: one file per kind of task (code), one file of conf/task per task (values)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import choice as choice
from tasks import classification as classification  # these fill Hydra's store with the schemas
from tasks import generation as generation
from tasks import image as image
from tasks.base import Rows, Task
from tasks.data import DataConfig, MissingData

__all__ = ["DataConfig", "MissingData", "Rows", "Task", "compose_task", "names", "stated", "suite"]
CONF = Path(__file__).resolve().parent.parent / "conf"


def names() -> list[str]:
    """The tasks that conf/task has a file for."""
    return sorted(file.stem for file in (CONF / "task").glob("*.yaml"))


def stated() -> dict[str, dict[str, Any]]:
    """What each task's own file says, without defaults and without what it takes from another task."""
    import yaml

    return {name: yaml.safe_load((CONF / "task" / f"{name}.yaml").read_text()) for name in names()}


def suite(name: str) -> dict[str, str | None]:
    """The tasks whose files say `suite: NAME`, each with its group; empty for an unknown name."""
    return {task: said.get("group") for task, said in stated().items() if said.get("suite") == name}


def compose_task(name: str, overrides: Sequence[str] = ()) -> Task:
    """The task of conf/task/NAME.yaml; `overrides` are `task.key=value`. Raises ValueError for an unknown name."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    if name not in names():
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(names())}")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return OmegaConf.to_object(compose("task_alone", overrides=[f"task={name}", *overrides]).task)  # type: ignore[return-value]
