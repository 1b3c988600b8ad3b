"""Whether a run is packed (`packed.py`) or padded: `train.padding`.

`auto` packs where the model can and more than `WORTH` of the positions of its training batches would be padding: measured on
2 CPU cores, there packing costs what it saves. What decides is the model, the data and the batches, never what a method gains;
where a method cannot be packed the record says so, as it says all of this: `model_source.padding`.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.layout import current
from bench.packed import install, stack
from bench.sharding import shards
from bench.train import autocast, to_device
from bench.untouched import perturbed, untouched
from methods.base import Batch, Unsupported

if TYPE_CHECKING:
    from bench.config import Config
    from bench.encoded import Encoded
    from bench.prepare import Prepared

WORTH = 0.01
LOOKED_AT = 100  # training batches, of the first epoch
CLOSE = {torch.float32: 3e-5, torch.float64: 1e-9}  # of the largest padded state, packed ones; in half precision 5e-2


def choose_padding(ready: Prepared, config: Config) -> None:
    """Pack the batches of `ready` from now on, or leave them padded, and say which.

    Raises `Unsupported` where they should be packed and cannot be.
    """
    against = _against(ready, config)
    if against and config.train.padding == "packed":
        raise Unsupported(f"train.padding=packed: {against}; train.padding=auto or padded runs it padded")
    ready.packed = not against
    ready.source["padding"] = {"kind": "padded", "reason": against} if against else {"kind": "packed"}


def _against(ready: Prepared, config: Config) -> str:
    """Why the batches are padded; empty where they are packed, from now on."""
    if config.train.padding == "padded":
        return "train.padding=padded"
    if ready.task.kind == "image":
        return "images are not padded"
    if shards(config):
        return "the frozen weights are shared out (shard=true)"
    if config.train.padding == "auto" and (share := padding_share(ready, config)) <= WORTH:
        return f"{share:.1%} of the positions are padding, no more than {WORTH:.0%}"
    return _pack(ready, config)


def _pack(ready: Prepared, config: Config) -> str:
    """Install what packs, and leave it where packed rows give what padded ones do; else say why not."""
    batch = to_device(ready.encoded["train"].batch(_two_lengths(ready.encoded["train"])), ready.device)
    try:
        end = stack(ready.model)[1]
        expected, _ = _states(ready, config, batch, end)
        undo = install(ready.model)
    except Unsupported as reason:
        return str(reason)
    found, packed = _states(ready, config, batch, end)
    close = CLOSE.get(found.dtype if config.train.precision == "fp32" else torch.bfloat16, 5e-2)
    if len(batch["labels"]) == 1 or (packed and (found - expected).abs().max() <= close * expected.abs().max()):
        return ""
    undo.close()
    if not packed:
        return "the blocks are given a cache, or no mask of rows"
    return "packed rows give other states under this method"


def padding_share(ready: Prepared, config: Config) -> float:
    """The share of padding in the positions of the training batches."""
    batches, length = ready.train_batches(config), ready.encoded["train"].length
    real = whole = 0
    for step in range(min(batches.per_epoch, LOOKED_AT)):
        lengths = [length(i) for i in batches.indices(step)]
        real, whole = real + sum(lengths), whole + len(lengths) * max(lengths)
    return 1 - real / max(whole, 1)


def _states(ready: Prepared, config: Config, batch: Batch, end: nn.Module) -> tuple[Tensor, bool]:
    """The hidden states of real tokens where the blocks end, (tokens, d), and whether they were packed until there.

    What is trained has other values meanwhile, the same in each call: a change that starts as none would hide what it
    does to packed tokens.
    """
    found: list[tuple[Tensor, bool]] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output.last_hidden_state
        found.append((states[:, -real.shape[1] :][real], current() is not None))

    real, model = batch["attention_mask"].bool(), ready.model
    with untouched(model), torch.no_grad(), perturbed(model), autocast(config.train.precision, ready.device):
        hook = end.register_forward_hook(look)
        model.eval()(**batch)
        hook.remove()
    return found[-1]


def _two_lengths(encoded: Encoded) -> list[int]:
    """The shortest row and the shortest one that is longer; one row alone where all are as long."""
    order = sorted(range(len(encoded)), key=encoded.length)
    longer = (i for i in order if encoded.length(i) > encoded.length(order[0]))
    return [order[0], *islice(longer, 1)]
