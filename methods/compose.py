"""Several methods as one: adapters side by side, or one method trained by another's optimizer or schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import METHODS, Batch, Method, Part, Unsupported, register


@register
@dataclass
class Compose(Method):
    """`parts` maps names of methods to their fields, in the order in which they are applied.

    `method=compose method.parts={dora: {rank: 4}, lisa: {}, lora_plus: {}}`: what the first ones train, a `Part`
    (optimizer, schedule of layers) acts on. One part may bring the optimizer, and its learning rate is that of the run,
    else that of the first; a schedule follows whichever optimizer there is.
    """

    family: ClassVar[str] = "composition"
    acts: ClassVar[str] = "as its parts"
    formula: ClassVar[str] = "the sum of its parts"
    oracle: ClassVar[str] = "its parts, one after the other"

    parts: Any = None  # a dict, untyped so that a command line can replace it whole; null: lora alone

    def __post_init__(self) -> None:
        self.parts = {"lora": {}} if self.parts is None else self.parts
        if not self.parts:
            raise ValueError("method.parts is empty: give at least one method, e.g. method.parts={lora: {}}")
        self.members = [_member(name, values or {}) for name, values in self.parts.items()]
        optimizing = [m for m in self.members if type(m).optimizer is not Method.optimizer]
        self.trainer = optimizing[0] if optimizing else None
        self.rivals = [_name(m) for m in optimizing]
        self.lr = (self.trainer or self.members[0]).lr  # type: ignore[misc]
        self.neutral = all(m.neutral for m in self.members)  # type: ignore[misc]
        self.backward = all(m.backward for m in self.members)  # type: ignore[misc]
        self.parallel = all(m.parallel for m in self.members)  # type: ignore[misc]

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        if len(self.rivals) > 1:
            raise Unsupported(f"{' and '.join(self.rivals)} each bring an optimizer: compose with one of them")
        batches = iter(batches)
        for i, member in enumerate(self.members):
            if i and isinstance(member, Part):
                member.attach(model)
            else:
                model = member.apply(model, batches)
        return model

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        chosen = (self.trainer or Method()).optimizer(model, lr, weight_decay)
        for m in self.members:
            if m is not self.trainer:
                m.follow(model, chosen)
        return chosen

    def penalty(self, model: nn.Module) -> Tensor | float:
        return sum(m.penalty(model) for m in self.members)

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        for m in self.members:
            m.after_step(model, step, steps)

    def finish(self, model: nn.Module) -> None:
        for m in self.members:
            m.finish(model)

    @property
    def finishes(self) -> bool:
        return any(m.finishes for m in self.members)

    def numbers(self, model: nn.Module) -> dict[str, float]:
        return {key: value for m in self.members for key, value in m.numbers(model).items()}

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {_name(m): m.state(model) for m in self.members}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        for m in self.members:
            m.load_state(model, state.get(_name(m), {}))


def _name(method: Method) -> str:
    return type(method).__module__.rpartition(".")[2]


def _member(name: str, values: dict[str, Any]) -> Method:
    """The method `name` with the fields `values`. Raises ValueError with the options for a wrong name or field."""
    if name not in METHODS:
        raise ValueError(f"method.parts: there is no method {name!r}; the methods are {', '.join(sorted(METHODS))}")
    known = [f.name for f in fields(METHODS[name])]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(
            f"method.parts.{name}.{unknown[0]} does not exist; its fields are {', '.join(known) or 'none'}"
        )
    return METHODS[name](**values)
