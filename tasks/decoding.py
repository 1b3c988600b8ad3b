"""Greedy decoding without idle rows: a finished row leaves the batch, the next prompt takes its place.

The tokens are those of `generate(do_sample=False)`, which goes on until the slowest row of a fixed batch is done.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from tasks.likelihood import pad

if TYPE_CHECKING:
    from torch import Tensor

REFILL = 0.75  # new prompts join once the batch is no fuller than this share: each prefill costs a forward of its own
ALIKE = 0.8  # of the longest prompt: shorter ones are read in a forward of their own, since padding costs as much


@dataclass
class Limits:
    """Where a row ends: at one of the tokens `ends`, after `new_tokens`, or where `stopped` says so of its new tokens."""

    ends: list[int]
    new_tokens: int
    pad_token: int
    stopped: Callable[[list[int]], bool]

    def end(self, new: list[int]) -> bool:
        return new[-1] in self.ends or len(new) >= self.new_tokens or self.stopped(new)


@dataclass
class Decoding:
    """The rows that are being decoded: which they are, their new tokens, what is masked, and their keys and values."""

    rows: list[int]
    mask: Tensor  # (rows, cached tokens), 0 on the padding in front
    cache: Any
    new: list[list[int]]

    def mergeable(self) -> bool:
        """Whether rows of another length can join: plain caches that hold just the tokens which `mask` tells of."""
        plain = all(type(layer).__name__ == "RoomyLayer" for layer in self.cache.layers)
        return plain and self.cache.get_seq_length() == self.mask.shape[1]

    def joined(self, others: list[Decoding]) -> Decoding:
        """These rows and those of `others`, the shorter ones padded in front."""
        import torch
        from torch.nn.functional import pad as fill

        sides = [self, *others]
        width = max(side.mask.shape[1] for side in sides)

        def stacked(parts: list[Tensor]) -> Tensor:
            return torch.cat([fill(t, (0, 0, width - t.shape[-2], 0)) for t in parts])

        for layers in zip(*(side.cache.layers for side in sides), strict=True):
            layers[0].keys, layers[0].values = stacked([c.keys for c in layers]), stacked([c.values for c in layers])
        self.mask = stacked([side.mask[..., None] for side in sides])[..., 0]
        self.rows, self.new = [r for side in sides for r in side.rows], [n for side in sides for n in side.new]
        return self

    def keep(self, places: list[int]) -> None:
        """Drop all rows but those at `places`, and the columns in front that none of these needs."""
        import torch

        index = torch.tensor(places, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        self.rows, self.new = [self.rows[i] for i in places], [self.new[i] for i in places]
        unused = int(self.mask.argmax(1).min())
        if unused and self.mergeable():
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]

    def finished(self, limits: Limits) -> dict[int, list[int]]:
        """Take out the rows that have ended: their new tokens by row."""
        ended = [limits.end(new) for new in self.new]
        found = {row: new for row, new, end in zip(self.rows, self.new, ended, strict=True) if end}
        if 0 < len(found) < len(self.rows):
            self.keep([place for place, end in enumerate(ended) if not end])
        elif found:
            self.rows = []
        return found


def greedy(model: Any, prompts: Iterable[list[list[int]]], limits: Limits) -> list[list[int]]:
    """The new tokens of each prompt, in the order of the prompts, ends included. Call it under `inference_mode`.

    `prompts` yields lists of prompts (token ids), a batch at a time, and is read on only when rows are free: no more rows
    are decoded at once than its first batch has.
    """
    source = iter(prompts)
    first = next(source, [])
    waiting = enumerate(chain(first, chain.from_iterable(source)))
    found: dict[int, list[int]] = {}
    active: Decoding | None = None
    while True:
        if active is None or (len(active.rows) <= REFILL * len(first) and active.mergeable()):
            free = len(first) - (len(active.rows) if active else 0)
            if fresh := dict(islice(waiting, free)):
                started = _start(model, fresh, limits)
                active = started.joined([active]) if active else started
        if active is None:
            return [found[row] for row in sorted(found)]
        found |= active.finished(limits)
        if active.rows:
            _step(model, active)
        else:
            active = None


def generate(model: Any, prompts: Iterable[list[list[int]]], limits: Limits) -> list[list[int]]:
    """The same by the model's own `generate`, for models that put something in front by way of it."""
    found = []
    for batch in prompts:
        ids, mask = _padded(model, batch, limits)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=limits.new_tokens, do_sample=False, num_beams=1,
            repetition_penalty=1.0, pad_token_id=limits.pad_token, eos_token_id=limits.ends,
        )  # fmt: skip
        width = ids.shape[1]  # what generates from embeddings gives back the new tokens alone
        found += (out[:, width:] if out.shape[1] > width and bool((out[:, :width] == ids).all()) else out).tolist()
    return found


def _start(model: Any, prompts: dict[int, list[int]], limits: Limits) -> Decoding:
    """Read the prompts, those of about one length together, and decode the first token of each."""
    groups = _alike(prompts)
    first = _read(model, groups[0], limits)
    if len(groups) > 1 and not first.mergeable():
        return _read(model, prompts, limits)
    return first.joined([_read(model, group, limits) for group in groups[1:]]) if len(groups) > 1 else first


def _alike(prompts: dict[int, list[int]]) -> list[dict[int, list[int]]]:
    """The prompts, longest first, in groups none of which is less than `ALIKE` as long as its longest."""
    groups: list[dict[int, list[int]]] = []
    longest = 0
    for row, prompt in sorted(prompts.items(), key=lambda item: -len(item[1])):
        if not groups or len(prompt) < ALIKE * longest:
            groups.append({})
            longest = len(prompt)
        groups[-1][row] = prompt
    return groups


def _read(model: Any, prompts: dict[int, list[int]], limits: Limits) -> Decoding:
    from tasks.kv_cache import with_room

    ids, mask = _padded(model, list(prompts.values()), limits)
    new, cache = _next(model, ids, mask, None)
    return Decoding(list(prompts), mask, with_room(cache), [[token] for token in new])


def _step(model: Any, active: Decoding) -> None:
    """Decode one token of each row."""
    import torch

    last = torch.tensor([[new[-1]] for new in active.new], device=active.mask.device)
    active.mask = torch.cat([active.mask, torch.ones_like(last)], 1)
    tokens, active.cache = _next(model, last, active.mask, active.cache)
    for new, token in zip(active.new, tokens, strict=True):
        new.append(token)


def _next(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> tuple[list[int], Any]:
    """The likeliest token behind each row of `ids`, (rows, tokens), and the cache that now holds them."""
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    out = model(input_ids=ids, attention_mask=mask, position_ids=places, **options)
    return out.logits[:, -1].argmax(-1).tolist(), out.past_key_values


def _padded(model: Any, prompts: list[list[int]], limits: Limits) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, longest prompt), padded in front."""
    device = next(model.parameters()).device
    ids, mask = pad(prompts, limits.pad_token, left=True), pad([[1] * len(p) for p in prompts], 0, left=True)
    return ids.to(device), mask.to(device)
