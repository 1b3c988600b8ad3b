"""The frozen prefix of a network: the blocks below everything that is trained, which give the same for a row each time.

It is looked for on the method's model and knows no method by name. Where there is one it runs in evaluation mode in
every training, its dropout off: a row then has one value at its end, whether that is computed again in each epoch or kept
(`features.py`). Trained parts, the dropout of a head included, stay in training mode.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.untouched import untouched
from methods.architectures import role
from methods.base import Adapted, Added, Batch, Unsupported, trains


@dataclass
class Prefix:
    """`chain`: modules that follow each other, each called on what the one before returned, but the first of a decoder.

    `below`: all that runs until it ends.
    """

    chain: list[nn.Module]
    below: dict[str, nn.Module]  # by name; the outermost alone
    rest: list[tuple[None, ...] | None]  # what each of `chain` returns behind its hidden states; None: they stand alone
    names: list[str]  # of `chain`
    read: list[int]  # states that something above it reads: 0 is what its first is given, k what its k-th returns


@dataclass(eq=False)
class Call:
    """One call of a module in a forward: the tensor it was given first, and what it returned."""

    module: nn.Module
    given: Any
    result: Any

    @property
    def hidden(self) -> Tensor | None:
        """The hidden states it returned; None where it returned more than tensors (T5's: position biases) beside them."""
        first, *rest = self.result if isinstance(self.result, tuple) else (self.result,)
        return first if isinstance(first, Tensor) and all(r is None or isinstance(r, Tensor) for r in rest) else None


def keep_evaluating(model: nn.Module, batch: Batch) -> Prefix | None:
    """Find the frozen prefix and leave it in evaluation mode from now on, whoever calls `train_mode`."""
    prefix = find(model, batch)
    for module in prefix.below.values() if prefix else ():
        module.always_eval = True  # type: ignore[assignment]
    return prefix


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but for what `keep_evaluating` found; where it is so already, a glance, as each step asks for it."""
    if not model.training:
        model.train()
    _set_mode(model, True)


def _set_mode(module: nn.Module, training: bool) -> None:
    own = vars(module)
    training = training and not own.get("always_eval")
    if own["training"] != training:
        module.training = training
    for child in own["_modules"].values():
        if child is not None:
            _set_mode(child, training)


def find(model: nn.Module, batch: Batch) -> Prefix | None:
    """The longest chain of frozen blocks from the first on, with the frozen norm and pooler behind the last; None without one.

    Nothing in it or before it is trained now or later (`trains`), replaced or hooked by the method, or called twice, and no
    gradient reaches it. Hooks of a block that only read (`methods.base.reads`) say which states are read beside the last.
    `batch`: any rows; one forward, which leaves no trace.
    """
    blocks = blocks_of(model)
    if not blocks or not _frozen(blocks[0]):
        return None
    calls = _trace(model, batch)
    chain = _chain(calls, blocks)
    if not chain:
        return None
    end = calls.index(chain[-1]) + 1
    names = {module: name for name, module in model.named_modules()}
    below = [names[c.module] for c in calls[:end]]
    twice = any(names[c.module] in below and not _idle(c) for c in calls[end:])
    around = [model.get_submodule(name) for name in _ancestors(names[chain[-1].module])]
    as_given = all(_only_read(m, m._forward_pre_hooks) for m in around)  # what they return comes after
    chained = [c.module for c in chain]
    unread = not any(any(_hooks(c.module)) for c in calls[:end] if c.module not in chained)
    if twice or not (as_given and unread) or not all(_frozen(c.module) for c in calls[:end]):
        return None
    rest = [(None,) * (len(c.result) - 1) if isinstance(c.result, tuple) else None for c in chain]
    outer = [n for n in dict.fromkeys(below) if not set(_ancestors(n)) & set(below)]
    modules = {n: model.get_submodule(n) for n in outer}
    return Prefix(chained, modules, rest, [names[m] for m in chained], _read(chained))


def _read(chain: list[nn.Module]) -> list[int]:
    """The states that hooks read, and the last."""
    before, after = [m._forward_pre_hooks for m in chain], [m._forward_hooks for m in chain]
    return [k for k in range(len(chain)) if before[k] or (k and after[k - 1])] + [len(chain)]


def _ancestors(name: str) -> list[str]:
    """Of "a.b.c": "", "a" and "a.b"."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks in their order; none where its architecture is not in the table."""
    try:
        pattern = re.compile(role(model, "layers"))
    except Unsupported:
        return []
    return [m for n, m in model.named_modules() if pattern.search(n)]


def _trace(model: nn.Module, batch: Batch) -> list[Call]:
    """The calls of one forward in the order in which they end, with a gradient wherever something trained has been."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(Call(module, args[0] if args else None, output))

    with untouched(model), torch.enable_grad():
        for p in [p for p in model.parameters() if trains(p)]:
            p.requires_grad_()
        model.eval()
        hooks = [m.register_forward_hook(note) for m in model.modules()]
        try:
            model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def _chain(calls: list[Call], blocks: list[nn.Module]) -> list[Call]:
    """Blocks from the first on, each called on the hidden states of the one before; behind the last, what follows it.

    A block may be called on others that need no gradient, as a decoder's first is, unless a hook reads them.
    """
    ended = [c for c in calls if c.module in blocks]
    if [c.module for c in ended] != blocks:
        return []
    chain: list[Call] = []
    for call in ended:
        if not _follows(chain, call, anew=True):
            return chain
        chain.append(call)
    for call in calls[calls.index(chain[-1]) + 1 :]:
        if _follows(chain, call) and any(True for _ in call.module.parameters()):  # dropout behind it is the head's
            chain.append(call)
    return chain


def _follows(chain: list[Call], call: Call, *, anew: bool = False) -> bool:
    fits = isinstance(call.given, Tensor) and (not chain or call.given is chain[-1].hidden)
    anew = anew and isinstance(call.given, Tensor) and not call.given.requires_grad and not any(_hooks(call.module))
    return (fits or anew) and call.hidden is not None and not call.hidden.requires_grad and _frozen(call.module)


def _idle(call: Call) -> bool:
    """Whether it is a dropout that nothing trained reaches: T5 has one before its blocks and behind them."""
    bare = next(call.module.parameters(), None) is None
    return bare and isinstance(call.result, Tensor) and not call.result.requires_grad


def _frozen(module: nn.Module) -> bool:
    """Whether the module is as pretrained and stays so."""
    inside = list(module.modules())
    changed = any(isinstance(m, Adapted | Added) or not _only_read(m, *_hooks(m)) for m in inside)
    return not changed and not any(trains(p) for p in module.parameters())


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_pre_hooks, module._forward_hooks


def _only_read(module: nn.Module, *hooks: dict[int, Any]) -> bool:
    """Whether the module runs as it was written, and these hooks of it only read."""
    return "forward" not in vars(module) and all(getattr(h, "reads", False) for own in hooks for h in own.values())
