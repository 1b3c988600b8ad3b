"""What `python -m bench --help` prints, in half a second: without torch, and without Hydra's own listing of groups.

Hydra copies its whole store of configurations for each question about a group, which takes seconds with many groups, and
the method files import torch: groups are read off the files here, and the text is still Hydra's `hydra.help.template`.
"""

from __future__ import annotations

import string
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf, open_dict

from bench.config import CONF


def show() -> None:
    """Print the help: examples, groups with their choices, values."""
    name_methods()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", return_hydra_config=True)
        template = string.Template(cfg.hydra.help.template)
        with open_dict(cfg):
            del cfg["hydra"]
    lines = [f"{group}: {', '.join(choices)}\n" for group, choices in groups().items()]
    print(template.substitute(APP_CONFIG_GROUPS="".join(lines), CONFIG=OmegaConf.to_yaml(cfg)))


def groups() -> dict[str, list[str]]:
    """The choices of each group: the files of conf/, and of `method` also the classes in methods/."""
    found: dict[str, list[str]] = {"method": methods()}
    for file in CONF.glob("*/**/*.yaml"):
        found.setdefault(file.parent.relative_to(CONF).as_posix(), []).append(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def methods() -> list[str]:
    """The names of the methods, which are those of their files."""
    return [f.stem for f in (CONF.parent / "methods").glob("*.py") if "\n@register\n" in f.read_text()]


def name_methods() -> None:
    """Fill the group `method` of Hydra's store with names alone."""
    note: dict[str, Any] = {"...": "python -m bench method=NAME --cfg job shows the fields of a method"}
    for name in methods():
        ConfigStore.instance().store(group="method", name=name, node=note)
