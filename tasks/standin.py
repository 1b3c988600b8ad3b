"""Generated rows with the columns, labels and metric of a real task, for machines that cannot have its rows.

Easy and hard examples are mixed, so that methods differ. They say that code works and never how good a method is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks import standin_texts
from tasks.data import Public
from tasks.standin_questions import answer_option, arithmetic, boxed_sum, cloze, quiz, sum_alone
from tasks.standin_texts import Pair

__all__ = ["PROBLEMS", "TEXTS", "cloze", "generate", "quiz", "texture"]

if TYPE_CHECKING:
    from tasks.base import Task

VERSION = 2
TRAIN, OTHERS = 2000, 400  # rows of the public training split (and those held out of it), of each other split


def generate(task: Task, seed: int = 0) -> Public:
    """The public splits of `task`, generated; always the same for the same task, version and seed."""
    from datasets import Dataset

    splits = {}
    for name in dict.fromkeys(task.splits.values()):
        rng = random.Random(f"{task.path}/{task.name}/{task.standin}/{name}/{seed}")
        held = task.holdout * {"heldout": 1, "threeway": 2}.get(task.protocol, 0)
        size = TRAIN + held if name == task.splits["train"] else OTHERS
        rows = [task.example(rng) for _ in range(size)]
        splits[name] = Dataset.from_list(rows)
    return Public(splits, {"kind": "standin", "standin": True, "revision": f"{task.standin} v{VERSION} seed {seed}"})


def texture(rng: random.Random, labels: int, size: int, *, grey: bool) -> tuple[Any, int]:
    """A noisy grating whose class is its direction and frequency; phase, contrast and colour say nothing."""
    import numpy as np
    from PIL import Image

    label, directions = rng.randrange(labels), math.ceil(math.sqrt(labels))
    angle, waves = math.pi * (label % directions) / directions, 1 + label // directions * 0.75
    y, x = np.mgrid[0:size, 0:size] / size
    phase = 2 * math.pi * (waves * (x * math.cos(angle) + y * math.sin(angle)) + rng.random())
    noise = np.random.default_rng(rng.getrandbits(64))
    plain = 0.5 + rng.uniform(0.15, 0.45) * np.sin(phase)
    pixels = plain[..., None] * noise.uniform(0.6, 1.0, 3) + noise.normal(0, 0.12, (size, size, 3))
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    return image.convert("L") if grey else image, label


_NAMES = "entailment reversed_entailment answerable yes_no acceptability sentiment paraphrase similarity word_sense"
TEXTS: dict[str, Callable[[random.Random, int], Pair]] = {n: getattr(standin_texts, n) for n in _NAMES.split()}
TEXTS["answer_option"] = answer_option
PROBLEMS = {f.__name__: f for f in (arithmetic, sum_alone, boxed_sum)}
