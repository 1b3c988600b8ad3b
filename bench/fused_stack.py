"""Several models that stand on one backbone, computed at once: every frozen weight is multiplied once.

The rows of all runs lie behind one another, as one batch. A copy of the model computes what is the same for every run; each
module that is a run's own (a changed layer, a trained norm, a head, a dropout), attention that drops out, and the loss compute
on that run's rows alone, as wide as they are alone, and draw from that run's random generators.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import packed
from bench.fused_modules import PASS, Each, EachBias, EachChange, EachDropout, Run, Unfusable, attention, same_place
from methods.base import Adapted, Added, Batch, trains

NAME = "paretune_fused"  # of attention, among the implementations that transformers knows
PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": -100}  # and `input_ids`: the model's own
LOSSES = ("cross_entropy", "mse_loss", "binary_cross_entropy_with_logits")


class Stack:
    """The models of all runs, which share what is frozen. Raises Unfusable where it cannot be."""

    def __init__(self, models: Sequence[nn.Module]):
        self.model = _carrier(models)
        modules = list(self.model.modules())
        if not any(p.dim() > 1 for p in self.model.parameters()) and not any(
            isinstance(m, EachBias | EachChange) for m in modules
        ):
            raise Unfusable(
                "no weight matrix is frozen, the same in all runs, and outside of what the method changes as a whole"
            )

    def __call__(self, runs: Sequence[Run]) -> list[Tensor]:
        """The loss of each run."""
        PASS.begin(runs)
        with _apart() as losses:
            self.model(**merged([run.batch for run in runs], self.model.config))
        if len(losses) != 1:
            raise Unfusable(f"its loss is not one of {', '.join(LOSSES)} of all rows")
        return losses[0]


def merged(batches: Sequence[Batch], config: Any) -> Batch:
    """The rows of all batches as one, those of text padded on the right. Raises Unfusable for what is neither text nor images."""
    padding = PADDING | {"input_ids": getattr(config, "pad_token_id", None) or 0}
    found = {}
    for key in batches[0]:
        values = [batch[key] for batch in batches]
        if values[0].dim() == 2 and key in padding:
            found[key] = _padded(values, padding[key])
        elif key in ("labels", "pixel_values"):
            found[key] = torch.cat(values)
        else:
            raise Unfusable(f"its batches have {key} of {tuple(values[0].shape)}, which is neither text nor an image")
    if all(hasattr(batch.get("attention_mask"), "host") for batch in batches):
        found["attention_mask"].host = _padded([b["attention_mask"].host for b in batches], 0)  # type: ignore[attr-defined]
    return found


def _padded(values: Sequence[Tensor], padding: int) -> Tensor:
    width = max(v.shape[1] for v in values)
    return torch.cat([v if v.shape[1] == width else F.pad(v, (0, width - v.shape[1]), value=padding) for v in values])


@contextmanager
def _apart() -> Iterator[list[list[Tensor]]]:
    """Inside the block torch's losses are the sums of those of each run, which the list is given."""
    found: list[list[Tensor]] = []

    def apart(inner: Any) -> Any:
        def loss(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own = zip(_lines(input), _lines(target), strict=True)
            found.append([inner(*pair, *args, **kwargs) for pair in own])
            return torch.stack(found[-1]).sum()

        return loss

    before = {name: getattr(F, name) for name in LOSSES}
    for name, inner in before.items():
        setattr(F, name, apart(inner))
    try:
        yield found
    finally:
        for name, inner in before.items():
            setattr(F, name, inner)


def _lines(x: Tensor) -> list[Tensor]:
    """Each run's part of what a loss is given: a line per row, or per position of a row, no more than the run has."""
    each, rest = divmod(len(x), sum(PASS.rows))
    if rest:
        raise Unfusable(f"its loss is given {len(x)} lines for {sum(PASS.rows)} rows")
    if each == 1:
        return [*x.split(PASS.rows)]
    rows = x.unflatten(0, (-1, each)).split(PASS.rows)
    return [
        own[:, : each - PASS.width + (run.width or 0)].flatten(0, 1) for run, own in zip(PASS.runs, rows, strict=True)
    ]


def _carrier(models: Sequence[nn.Module]) -> nn.Module:
    """A copy of the first run's model on the same weights, with every run's own modules in their places."""
    first = models[0]
    memo: dict[int, Any] = {id(t): t for t in (*first.parameters(), *first.buffers())}
    for config in {id(m.config): m.config for m in first.modules() if hasattr(m, "config")}.values():
        memo[id(config)] = _with_attention(config)
    memo |= {id(modules[0]): each for modules, each in _own(models)}
    found = copy.deepcopy(first, memo)
    if isinstance(found, Each):
        raise Unfusable("the method changes the model as a whole")
    for module in found.modules():
        if _packs(module):
            del module.forward  # the first run's
            module.forward = packed.packing(module.forward)  # type: ignore[method-assign]
    return found


def _with_attention(config: Any) -> Any:
    """The model's configuration, with our implementation of attention. Raises Unfusable where it has none to be replaced."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known

    name = config._attn_implementation
    if name not in known or name not in masks:
        raise Unfusable(f"model.attention={name} cannot be computed run by run; sdpa can")
    PASS.attention, PASS.skips = known[name], masks[name] is sdpa_mask
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, masks[name])
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
    return any(hook not in packed.HOOKS for hook in hooks) or ("forward" in vars(module) and not _packs(module))


def _packs(module: nn.Module) -> bool:
    return hasattr(vars(module).get("forward"), "packs")
