"""Blocks of code that leave no trace in a model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import trains

NOISE = 0.02


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving: gradients, buffers, attributes and modes of the model's modules, and all random states."""
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modules = [(m, dict(vars(m))) for m in model.modules()]
    containers = [(v, v.copy()) for _, a in modules for v in a.values() if type(v) in (dict, list, set)]
    buffers = [(t, t.detach().clone()) for t in _plain_tensors(model)]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    for p in model.parameters():
        p.grad = None
    try:
        yield
    finally:
        for m, attributes in modules:
            vars(m).clear()
            vars(m).update(attributes)
        for container, before in containers:  # `_buffers`, counters, caches: in place, since modules may share them
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        with torch.no_grad():
            for t, value in buffers:
                t.copy_(value)
        for p, grad, requires_grad in gradients:
            p.requires_grad_(requires_grad).grad = grad
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Other values for what is trained inside the block: an output of zeros would not show what it reads."""
    trained = [p for p in model.parameters() if trains(p)]
    before = [p.detach().clone() for p in trained]
    with torch.no_grad():
        try:
            for p in trained:
                p.add_(torch.randn_like(p), alpha=NOISE)
            yield
        finally:
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)


def _plain_tensors(model: nn.Module) -> list[Tensor]:
    """Buffers, and tensors that modules hold as plain attributes."""
    plain = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return [*model.buffers(), *plain]
