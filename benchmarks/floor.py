"""The floor of a training step with a frozen backbone: FLOPs, and bytes kept for the backward, that no adapter can avoid.

A gradient goes through the whole frozen model, from the loss to the embedded text, and nothing but the head is trained:
a forward and the products of a backward by activations (2 x forward, where full fine-tuning has 3), and what the backward
of each frozen operation needs. A method above all layers (a linear probe, a side network) stays below this floor. Both
numbers are counted, not measured: the same on every machine. `python -m benchmarks.methods` shows them for each method.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench import measure


def counted(model: nn.Module, rows: dict[str, Tensor], method: Any = None) -> dict[str, int]:
    """FLOPs of a step (`train_step`) and of a forward, and bytes kept for the backward (`activations`), on one batch."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        value = model(**batch).loss
        return value if method is None else value + method.penalty(model)

    return measure.probe(model, rows, loss, backward=method is None or method.backward)


def floor(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, int]:
    """The same of a frozen model with a trained vector, added to its embedded inputs, so that a gradient goes all the way."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_parameter("shift", nn.Parameter(embedding.weight.new_zeros(embedding.weight.shape[1])))
    hook = embedding.register_forward_hook(lambda module, given, out: out + module.shift)
    try:
        return counted(model, rows)
    finally:
        hook.remove()
        del embedding.shift
