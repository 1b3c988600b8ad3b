"""A model's footprint from those of shallow ones, wherever it can be shown that each further block adds the same.

Shown is: every block has the same parameters, and trains the same of them; models of one, two and three blocks lie on
one line in all that adds up; and the parameters of the whole model, which are counted at once, lie on it too. A peak does
not add up, but is one of a few lines, of which `_peaks_stay` knows the steepest. Where something fails, the whole is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench.config import Config
from bench.footprint import applied, footprint, with_live
from methods.base import Unsupported

Found = dict[str, int]
PEAKS = ("forward_peak", "backward_peak")
DEEP = 7  # blocks, at least: the shallow models have six

_known: dict[str, Any] = {}  # data sets of one kind differ in their rows alone


def counted(config: Config, lengths: Sequence[int], *, gpu: bool = False, at_once: bool = False) -> Found:
    """The `footprint` of the whole model."""

    def shallow(depth: int | None) -> Found:
        make = partial(footprint, config, lengths, gpu=gpu, at_once=at_once, depth=depth)
        return _once(f"{depth} {at_once} {list(lengths)}", config, gpu, make)

    depth = _once("depth", config, gpu, lambda: _shown(config, shallow))
    for n in (1, 2) if depth else ():
        one, two = shallow(n), shallow(n + 1)
        if not at_once or _peaks_stay(one, two, shallow(n + 2)):
            return along(config, one, two, depth - n)
    return shallow(None)


def along(config: Config, one: Found, two: Found, steps: int) -> Found:
    """What lies on the line through two footprints, so many of their differences from the first."""
    return with_live({k: one[k] + steps * (two[k] - one[k]) for k in one}, config)


def _shown(config: Config, shallow: Callable[[int], Found]) -> int:
    """How many blocks the model has, where each further one adds the same; else 0."""
    from bench.model import counts

    model, head = applied(config)
    depth = getattr(model.config, "num_hidden_layers", 0)
    if depth < DEEP or not _alike(model):
        return 0
    try:
        one, two, three = map(shallow, (1, 2, 3))
    except Unsupported:  # by a method that needs more blocks
        return 0
    third, whole = (along(config, one, two, n) for n in (2, depth - 1))
    same = (
        all(third[k] == three[k] for k in three if k not in (*PEAKS, "live"))
        and counts(model, head).items() <= whole.items()
    )
    return depth if same else 0


def _alike(model: Any) -> bool:
    """Whether all blocks have the same parameters, train the same of them, and attend in the same way, in one stack."""
    kinds: dict[str, set[Any]] = {}
    for name, p in model.named_parameters():
        place = re.sub(r"\.\d+\.", ".*.", name, count=1)
        kinds.setdefault(place, set()).add((p.shape, p.dtype, p.requires_grad))
    attention = set(getattr(model.config, "layer_types", None) or ())
    return all(len(k) == 1 for k in kinds.values()) and len(attention) < 2 and not model.config.is_encoder_decoder


def _peaks_stay(one: Found, two: Found, three: Found) -> bool:
    """Whether the moments with the most bytes, one in the forward and one in the backward, have the most in deeper models too.

    As blocks are added, the bytes of each moment grow along a line. In the forward, a moment has before it all blocks, which
    leave at least what is `held` at its end, or none; in the backward, it has above it blocks that left gradients, and below
    it ones that still keep activations. A peak that grows evenly, and as fast as the fastest of these, is not overtaken.
    """
    more = {k: two[k] - one[k] for k in one}
    evenly = all(three[k] - two[k] == more[k] for k in PEAKS)
    backward = more["weights"] + max(more["activations"], more["gradients"])
    return evenly and more["forward_peak"] >= more["held"] and more["backward_peak"] >= backward


def _once(what: str, config: Config, gpu: bool, make: Callable[[], Any]) -> Any:
    task, train = config.task, config.train
    how = train.gradient_checkpointing, train.offload, train.padding, train.precision, train.accumulate > 1, gpu
    key = repr((what, config.method, config.model, task.model_class, task.options(), how))
    if key not in _known:
        _known[key] = make()
    return _known[key]
