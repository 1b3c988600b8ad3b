"""Every file of conf/best names a cell of the grid, is found by it, and can be overridden."""

import re

import pytest

from bench.config import CONF, compose
from methods import METHODS
from tasks import names

MODELS = [file.stem for file in (CONF / "model").glob("*.yaml")]
CELLS = {f"{m}_{model}_{t}": (m, model, t) for m in METHODS for model in MODELS for t in names()}


@pytest.mark.parametrize("file", sorted((CONF / "best").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_cell_finds_its_tuned_values(file):
    method, model, task = CELLS[file.stem]
    assert "python -m bench" in file.read_text()  # what chose them
    cell = [f"method={method}", f"model={model}", f"task={task}"]
    assert compose(cell).train.lr is not None
    assert compose([*cell, "train.lr=0.5"]).train.lr == 0.5
    assert compose([*cell, "~best"]).train.lr is None


@pytest.mark.parametrize("file", sorted((CONF / "experiment" / "published").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_published_recipe_composes_and_names_its_source(file):
    config = compose([f"experiment=published/{file.stem}"])
    source = file.read_text().splitlines()[1]
    assert re.search(r"et al\. 20\d\d|[\w-]+/[\w-]+:", source), source  # a paper, or a file of a repository
    assert "_".join(config.choices[part] for part in ("method", "model", "task")).startswith(file.stem)
    if "max_length" in file.read_text():
        assert config.model.max_length == config.task.max_length
    assert (config.train.epochs or 0) >= 5 or config.train.steps >= 5000
