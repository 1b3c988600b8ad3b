"""The blocks of several models that stand on one backbone, computed at once: every frozen weight is multiplied once.

The tokens of all runs lie behind one another, (1, N, width). A copy of the blocks computes what is the same for every
token and every run; each module that is a run's own (a changed layer, a trained norm, a dropout), and attention, computes on
that run's tokens alone, in their own shape (rows, positions, width), and draws from that run's random generators.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import packed
from bench.fused_modules import (
    PASS,
    Each,
    EachBias,
    EachChange,
    EachDropout,
    Run,
    Span,
    Unfusable,
    attention,
    same_place,
)
from bench.layout import running
from methods.base import Adapted, Added, trains

NAME = "paretune_fused"  # of attention, among the implementations that transformers knows


class Stack:
    """The blocks of all runs. `columns`: for each depth the block of every run, which share what is frozen."""

    def __init__(self, columns: Sequence[Sequence[nn.Module]]):
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, attention)
        self.layers = [_carrier(column) for column in columns]
        matrices = any(p.dim() > 1 for layer in self.layers for p in layer.parameters())
        if not matrices and not any(
            isinstance(m, EachBias | EachChange) for layer in self.layers for m in layer.modules()
        ):
            raise Unfusable("no weight matrix of the blocks is frozen and the same in all runs")

    def __call__(self, runs: Sequence[Run]) -> tuple[Tensor, list[Span]]:
        """The last block's hidden states (1, N, width), and which are whose."""
        args, kwargs, masks = merge(runs)
        PASS.spans = [*_spans(runs, masks)]
        x = torch.cat([run.hidden.flatten(0, 1) for run in runs])[None]
        with running(None):
            for layer in self.layers:
                out = layer(x, *args, **kwargs)
                x = out[0] if isinstance(out, tuple) else out
        return x, PASS.spans


def _spans(runs: Sequence[Run], masks: Sequence[Any]) -> Iterator[Span]:
    start = 0
    for run, mask in zip(runs, masks, strict=True):
        rows, positions, _ = run.hidden.shape
        yield Span(start, start + rows * positions, (rows, positions), mask, run)
        start += rows * positions


def _carrier(column: Sequence[nn.Module]) -> nn.Module:
    """A copy of the first run's block on the same weights, with every run's own modules in their places."""
    memo: dict[int, Any] = {id(t): t for t in (*column[0].parameters(), *column[0].buffers())}
    for config in {id(m.config): m.config for m in column[0].modules() if hasattr(m, "config")}.values():
        memo[id(config)] = _with_attention(config)
    memo |= {id(modules[0]): each for modules, each in _own(column)}
    found = copy.deepcopy(column[0], memo)
    if isinstance(found, Each):
        raise Unfusable("the method changes every block as a whole")
    return found


def _with_attention(config: Any) -> Any:
    """The model's configuration, with our implementation of attention. Raises Unfusable where it has none to be replaced."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known

    if config._attn_implementation not in known:
        raise Unfusable(f"model.attention={config._attn_implementation} cannot be computed run by run; sdpa can")
    PASS.attention = known[config._attn_implementation]
    found = copy.copy(config)
    found._attn_implementation_internal = NAME
    return found


def _own(modules: Sequence[nn.Module]) -> Iterator[tuple[Sequence[nn.Module], nn.Module]]:
    """The outermost modules that each run must compute by itself, and what takes their place."""
    if all(isinstance(m, nn.Dropout) for m in modules):
        if modules[0].training and any(m.p for m in modules):  # type: ignore[union-attr, misc]
            yield modules, EachDropout(modules) if len({m.p for m in modules}) == 1 else Each(modules)
    elif _differs(modules):
        yield modules, _each(modules)
    else:
        for name, _ in modules[0].named_children():
            yield from _own([m.get_submodule(name) for m in modules])


def _each(modules: Sequence[nn.Module]) -> Each:
    """What takes the place of modules that differ: the products that they share are computed at once."""
    layers: list[Any] = [m.base if isinstance(m, Adapted) else m for m in modules]
    plain = all(type(m) is nn.Linear and not trains(m.weight) and not hooked(m) for m in layers)  # type: ignore[arg-type]
    if any(map(hooked, modules)) or not plain or not same_place([m.weight for m in layers]):
        return Each(modules)
    return EachBias(modules) if isinstance(modules[0], nn.Linear) else EachChange(modules)


def _differs(modules: Sequence[nn.Module]) -> bool:
    first = modules[0]
    names = [n for n, _ in first.named_children()]
    if any(type(m) is not type(first) or [n for n, _ in m.named_children()] != names for m in modules):
        return True
    if any(isinstance(m, Adapted | Added) or hooked(m) for m in modules):
        return True
    tensors = [[*m.parameters(recurse=False), *m.buffers(recurse=False)] for m in modules]
    if any(trains(p) for p in first.parameters(recurse=False)):
        return True
    return len({tuple(t.data_ptr() for t in own) for own in tensors}) > 1


def hooked(module: nn.Module) -> bool:
    """Whether a method has put hooks on a module, or a function in the place of its forward."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(hook not in packed.OF_BLOCKS for hook in hooks) or "forward" in vars(module)


def merge(runs: Sequence[Run]) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
    """What all blocks are given beside hidden states, out of what those of each run are given; and each run's mask.

    Tensors of (rows or 1, positions, ...) follow the tokens; one of four dimensions is an attention mask. A cache of keys
    and values, which nobody reads in training, is left out. Raises Unfusable for anything else that differs.
    """
    shapes, masks = [tuple(r.hidden.shape[:2]) for r in runs], _Masks(len(runs))
    args = tuple(_merged(values, shapes, masks) for values in zip(*(r.args for r in runs), strict=True))
    kwargs = {key: _merged([r.kwargs[key] for r in runs], shapes, masks) for key in runs[0].kwargs}
    return args, kwargs, masks.found


class _Masks:
    def __init__(self, runs: int):
        self.found: list[Any] = [None] * runs
        self.seen = False

    def keep(self, values: list[Any]) -> None:
        if self.seen and any(a is not b for a, b in zip(values, self.found, strict=True)):
            raise Unfusable("its blocks are given two kinds of attention masks")
        self.found, self.seen = values, True


def _merged(values: Sequence[Any], shapes: list[Any], masks: _Masks) -> Any:
    first = values[0]
    tensors = [v for v in values if isinstance(v, Tensor)]
    if any(t.dim() == 4 for t in tensors):
        masks.keep([*values])
        return None
    if len(tensors) == len(values) and all(t.shape[1:2] == s[1:] for t, s in zip(values, shapes, strict=True)):
        return torch.cat([t.expand(s[0], *t.shape[1:]).flatten(0, 1) for t, s in zip(values, shapes, strict=True)])[
            None
        ]
    if isinstance(first, tuple):
        return tuple(_merged(part, shapes, masks) for part in zip(*values, strict=True))
    if type(first).__name__.endswith("Cache"):
        return None
    if tensors or any(v != first for v in values):
        raise Unfusable(f"its blocks are given {type(first).__name__}s that differ from run to run")
    return first
