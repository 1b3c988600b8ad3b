"""What a micro-batch costs on a model's shape: FLOPs, parameters, and bytes, counted without one number being computed.

torch's fake tensors take the way that those of a CPU would, kernel by kernel, dtype by dtype, and hold nothing. Where a GPU
takes another, attention, they are led along that one.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.config import Config
from bench.layout import Layout, recomputing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def footprint(
    config: Config, lengths: Sequence[int], *, gpu: bool = False, at_once: bool = True, depth: int | None = None
) -> dict[str, int]:
    """Of one micro-batch with rows of these many tokens, an image being one, on a CPU or a GPU.

    As `measure.probe` has it: `train_step`, `forward`, `activations`, `offloaded`. As `model.counts`: `trained_params`,
    `stored_bytes`. As `live.kinds`: `weights`, `gradients`, `optimizer`. With `at_once`, which takes longer, the bytes that
    live at once on the device: the most in `forward_peak` and `backward_peak`, what is `held` at the forward's end, and the
    most in a step, `live`. depth: of a model of so many blocks, not of all. Always draws the same.
    Raises Unsupported where the method has no meaning there, UnknownShape where the model's size is not known.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_live(_footprint(config, lengths, gpu, at_once, depth), config)


def with_live(found: dict[str, int], config: Config) -> dict[str, int]:
    """These numbers, and the most bytes at once in a step, `live`, where peaks are among them."""
    if "held" not in found:
        return found
    before = found["gradients"] if config.train.accumulate > 1 else 0  # of the micro-batches before
    during = max(found["forward_peak"], found["backward_peak"]) + before
    return found | {"live": max(during, found["weights"] + found["gradients"]) + found["optimizer"]}


def _footprint(config: Config, lengths: Sequence[int], gpu: bool, at_once: bool, depth: int | None) -> dict[str, int]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.live import Live, kinds
    from bench.measure import probe
    from bench.model import counts
    from bench.train import Loop, autocast

    model, head = applied(config, depth)
    found = counts(model, head)
    here = replace(config.train, offload="none")  # nothing is trained on this device
    backward, offload = config.method.backward, config.train.offload
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, fused() if gpu else nullcontext():
        fake.cache_enabled = offload == "none"  # it would hold on to the storages that are given back
        _without_numbers(model)
        _pack(model, config, lengths, gpu)
        loop = Loop(model, config.method, here, steps=1, device=torch.device("cpu"))
        live = Live(model) if at_once else None

        def loss(batch: Any) -> Tensor:
            with autocast(here.precision, loop.device):  # the outermost one holds weights that it has cast
                value = loop.loss(batch)
                if live:
                    found.update(held=live.bytes, forward_peak=live.peak)
            if live:
                live.peak = live.bytes
            return value

        found |= probe(model, _batch(model, config, lengths), loss, backward=backward, offload=offload, live=live)
    return found | ({"backward_peak": live.peak} if live else {}) | kinds(model, config.method)


@contextmanager
def fused() -> Iterator[None]:
    """Attention in one kernel that keeps no scores, with dropout too, as on a GPU; also in blocks that are computed again."""
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch makes a bias of it, which each layer keeps
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = kernel(query, key, value, attn_mask=attn_mask)[0]
    return found


def applied(config: Config, depth: int | None = None) -> tuple[nn.Module, set[int]]:
    """The model from its shape, with the method applied; ids of the head's parameters."""
    from bench.shapes import skeleton

    model: Any = skeleton(config.model, config.task, depth)
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
