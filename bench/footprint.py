"""What a micro-batch costs on a model's shape: FLOPs, parameters, and bytes, counted without one number being computed.

torch's fake tensors take the way that those of a CPU would, kernel by kernel, dtype by dtype, and hold nothing. Where a GPU
takes another, attention, they are led along that one.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from bench.config import Config
from bench.layout import Layout, recomputing

if TYPE_CHECKING:
    from collections.abc import Sequence


def footprint(config: Config, lengths: Sequence[int], *, gpu: bool = False) -> dict[str, int]:
    """Of one micro-batch with rows of these many tokens, an image being one, on a CPU or a GPU.

    As `measure.probe` has it: `train_step`, `forward`, `activations`, `offloaded`. As `model.counts`: `trained_params`,
    `stored_bytes`. As `live.kinds`: `weights`, `gradients`, `optimizer`. And `live`: the most bytes at once on the device.
    Raises Unsupported where the method has no meaning there, UnknownShape where the model's size is not known.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.live import Live, kinds
    from bench.measure import probe
    from bench.model import counts
    from bench.train import Loop

    model, head = _applied(config)
    found = counts(model, head)
    here = replace(config.train, offload="none")  # nothing is trained on this device
    backward, offload = config.method.backward, config.train.offload
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Fused() if gpu else nullcontext():
        fake.cache_enabled = offload == "none"  # it would hold on to the storages that are given back
        _without_numbers(model)
        _pack(model, config, lengths, gpu)
        loop = Loop(model, config.method, here, steps=1, device=torch.device("cpu"))
        live = Live(model)
        found |= probe(model, _batch(model, config, lengths), loop.loss, backward=backward, offload=offload, live=live)
    still = kinds(model, config.method)
    during = live.peak + (still["gradients"] if config.train.accumulate > 1 else 0)  # those of the micro-batches before
    step = still["weights"] + still["gradients"]
    return found | still | {"live": max(during, step) + still["optimizer"]}


class Fused(TorchFunctionMode):
    """Attention in one kernel that keeps no scores, with dropout too, as on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return function(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch makes a bias of it, which each layer keeps
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = kernel(query, key, value, attn_mask=attn_mask)[0]
    return found


def _applied(config: Config) -> tuple[nn.Module, set[int]]:
    """The model from its shape, with the method applied; ids of the head's parameters."""
    from bench.shapes import skeleton

    model: Any = skeleton(config.model, config.task)
    head = {id(p) for p in model.parameters() if p.requires_grad}
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})
    method = config.method
    if getattr(method, "start", None) == "fisher":  # looks at data and weights; counts are the same
        method = replace(method, start="random")
    with torch.device("meta"):
        model = method.apply(model, iter(()))
    if config.train.precision == "bf16_full":
        model.to(torch.bfloat16)
    return model, head


def _without_numbers(model: nn.Module) -> None:
    """Put fake tensors of this device in place of those of the meta device."""
    new: dict[int, Tensor] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, old in place.items():
                if old is not None:
                    place[name] = new.setdefault(id(old), _fake(old))  # type: ignore[assignment]


def _fake(old: Tensor) -> Tensor:
    found = torch.empty_like(old, device="cpu")
    if isinstance(old, nn.Parameter):
        found = nn.Parameter(found, requires_grad=old.requires_grad)
    vars(found).update(vars(old))
    return found


def _pack(model: nn.Module, config: Config, lengths: Sequence[int], gpu: bool) -> None:
    """Let the model run packed where a run would: but for what only numbers tell, see `bench/padding.py`."""
    from bench.packed import install
    from methods.base import Unsupported

    if config.train.padding == "padded" or config.task.kind == "image" or config.shard:
        return
    with suppress(Unsupported):
        install(model, partial(_layout, lengths, gpu))


def _layout(lengths: Sequence[int], gpu: bool, mask: Tensor, host: Tensor | None) -> Layout:
    """That of rows with these many tokens, and whatever a method puts before them."""
    before = mask.shape[1] - max(lengths)
    each = [n + before for n in lengths]
    return Layout(each, mask.shape[1], torch.zeros(sum(each), dtype=torch.long), at_once=gpu)


def _batch(model: Any, config: Config, lengths: Sequence[int]) -> dict[str, Any]:
    rows, width = len(lengths), max(lengths)
    if config.task.kind == "image":
        size = model.config.image_size
        return {"pixel_values": torch.zeros(rows, 3, size, size), "labels": torch.zeros(rows, dtype=torch.long)}
    ids = torch.zeros(rows, width, dtype=torch.long)
    one = not config.task.model_class.endswith(("LM", "LMHeadModel"))  # one label a row, or one a token
    real = one and config.task.options().get("num_labels") == 1
    labels = torch.zeros(rows, dtype=torch.float if real else torch.long) if one else ids
    padded = min(lengths) < width  # a mask of ones is none
    return {"input_ids": ids, "labels": labels} | ({"attention_mask": torch.ones_like(ids)} if padded else {})
