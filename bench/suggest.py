"""Did you mean ...: the nearest key or choice to a misspelled one."""

from __future__ import annotations

import dataclasses
import difflib
import re

from bench.config import CONF, Config, DataConfig, ModelConfig, TrainConfig
from methods import METHODS

EXTRAS = {
    "joblib": "joblib",
    "submitit_slurm": "slurm",
    "submitit_local": "slurm",
    "ray": "ray",
}  # launchers of plug-ins
GROUPS = ("method", "model", "task", "data", "experiment")


def suggest(message: str, arguments: list[str]) -> str:
    """A sentence with the nearest options to what `message`, an error of Hydra's, complains about; else an empty string."""
    if found := re.search(r"Could not load 'hydra/launcher/(\w+)'", message):
        extra = EXTRAS.get(found[1])
        return f"This launcher needs a plug-in: pip install 'paretune[{extra}]'" if extra else ""
    if found := re.search(r"Could not find '(\w+)/([\w-]+)'", message):
        group, wrong = found.groups()
        return _nearest(f"{group}=", wrong, options(group))
    if found := re.search(r"Could not override '([\w.@/]+)'|Key '([\w.]+)' (?:is )?not in", message):
        wrong = found.group(1) or found.group(2)
        whole = next((a.partition("=")[0].lstrip("+~") for a in arguments if wrong in a.partition("=")[0]), wrong)
        chosen = next((a.partition("=")[2] for a in arguments if a.startswith("method=")), "lora")
        return _nearest("", whole, keys(chosen))
    return ""


def options(group: str) -> list[str]:
    """The names that `group=` can take."""
    own = [p.stem for p in (CONF / group).glob("*.yaml")]
    return sorted({*own, *(METHODS if group == "method" else ())})


def keys(method: str) -> list[str]:
    """Every key that can be set, in dotted form."""
    parts = {"train": TrainConfig, "data": DataConfig, "model": ModelConfig, "": Config}
    if method in METHODS:
        parts["method"] = METHODS[method]
    names = [f"{p}.{f.name}".lstrip(".") for p, cls in parts.items() for f in dataclasses.fields(cls)]
    return sorted({*names, *GROUPS})


def _nearest(prefix: str, wrong: str, right: list[str]) -> str:
    near = difflib.get_close_matches(wrong, right, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(prefix + n for n in near)}?" if near else ""
