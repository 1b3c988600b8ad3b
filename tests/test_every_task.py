"""Every method on every kind of task: it trains, predicts every row, and is scored."""

import functools
import itertools

import numpy as np
import pytest
import torch

from bench.model import trained_state
from bench.random_models import random_model
from methods import METHODS, Unsupported
from tasks import DataConfig
from tests.test_methods import LR, learn, make
from tests.test_tasks import batches, small

TASKS = {
    "classification": ("rte", "bert"),
    "regression": ("stsb", "bert"),
    "generation": ("gsm8k", "llama"),
    "choice": ("arc_easy", "llama"),
    "image": ("digits", "vit"),
}


@functools.cache
def prepared(name: str):
    """The task, its processor, six rows and their batch."""
    task, processor = small(name)
    rows = task.load(DataConfig("standin")).splits["val"]
    return task, processor, rows, next(batches(task, rows, processor, 6))[0]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_trains_predicts_and_is_scored(name, kind):
    task, processor, rows, batch = prepared(TASKS[kind][0])
    torch.manual_seed(0)
    model, method = random_model(TASKS[kind][1], num_labels=getattr(task, "labels", 0)), make(name)
    for key, value in task.options().items():
        setattr(model.config, key, value)
    try:
        model = method.apply(model, itertools.repeat(batch))
    except Unsupported as reason:
        pytest.skip(str(reason))
    before = {n: p.clone() for n, p in trained_state(model).items()}
    if before:  # zero-shot trains nothing
        assert all(np.isfinite(learn(method, model.train(), batch, LR.get(name, 1e-2), steps=2)))
        assert any(not torch.equal(p, before[n]) for n, p in trained_state(model).items())
    method.finish(model)
    table = task.predict(model.eval(), batches(task, rows, processor, 4), processor)
    assert list(table["row_id"]) == list(rows["row_id"])
    assert np.isfinite(task.score(table)[task.metric])
