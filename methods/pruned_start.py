"""What the narrow blocks of `lst` start from: the important rows and columns of the backbone's (its section 3.3).

As in its official code, the kept outputs of one matrix are the kept inputs of the next, from the embeddings on, through
all layers: in T5 from the encoder's last to the decoder's first, and in the decoder through cross-attention, whose keys
and values keep the inputs that its queries keep. Unlike there, attention keeps equally many channels of each head, so
that heads stay heads; where rotary positions turn channels in pairs, both or none of a pair is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from methods.architectures import role
from methods.base import Batch

Kept = dict[str, tuple[Tensor, Tensor | None]]  # module of a block: kept outputs, kept inputs (None for a norm)
NORMS = (  # that read what a layer reads, what its attention has added to it, what the layer writes; T5's are numbered
    r"(layernorm_before|input_layernorm|ln_1)$",
    r"(layernorm_after|post_attention_layernorm|ln_2|attention\.output\.LayerNorm|sa_layer_norm)$",
    r"(?<!attention\.)output(\.LayerNorm|_layer_norm)$",
)


def fisher(model: Any, batches: Iterator[Batch], samples: int) -> dict[int, Tensor]:
    """Squared gradients of the loss, summed over `samples` rows, by id of the parameter: the empirical Fisher information."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    total = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in frozen}
    for p in frozen:
        p.requires_grad_()
    rows = ({k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["labels"])))
    for row in islice(rows, samples):
        gradients = torch.autograd.grad(model(**row).loss, frozen, allow_unused=True)
        for p, g in zip(frozen, gradients, strict=True):
            if g is not None:
                total[id(p)] += g.float().square()
    for p in frozen:
        p.requires_grad_(False)
    return total


def magnitude(model: nn.Module) -> dict[int, Tensor]:
    """Absolute values, by id of the parameter."""
    return {id(p): p.detach().float().abs() for p in model.parameters()}


@torch.no_grad()
def start_blocks(
    model: Any, layers: list[nn.Module], blocks: dict[int, nn.Module], scores: dict[int, Tensor], keep: Tensor
) -> Tensor:
    """Give each narrow block i of `blocks` the kept part of layer i; `scores` say what is important.

    `keep` are the channels that the first layer reads; returned are those that the last one writes.
    """
    k = model.config.hidden_size // len(keep)
    for i, layer in enumerate(layers):
        kept, keep = choose(model, dict(layer.named_modules()), keep, k, scores=scores)
        for part, (rows, columns) in kept.items() if i in blocks else ():
            copy_part(layer.get_submodule(part), blocks[i].get_submodule(part), rows, columns)
    for wide, small in zip(tables(layers[0]), tables(blocks[min(blocks)]), strict=True):
        small.weight.copy_(wide.weight)
    return keep


def tables(layer: nn.Module) -> list[nn.Embedding]:
    """A layer's own embeddings: of relative positions, one number per head, which the first layer of T5 has for all."""
    return [m for m in layer.modules() if isinstance(m, nn.Embedding)]


def first_channels(model: Any, k: int, scores: dict[int, Tensor]) -> Tensor:
    """The k-th part of the embeddings' channels that the first layer of a narrow network reads."""
    words = model.get_input_embeddings()
    if isinstance(words, nn.Embedding):
        return top(scores[id(words.weight)].sum(0), k)
    return top(scores[id(words.projection.weight)].flatten(1).sum(1), k)  # patches


def choose(
    model: Any, modules: dict[str, Any], keep: Tensor, k: int, *, scores: dict[int, Tensor]
) -> tuple[Kept, Tensor]:
    """What to keep of one layer that reads the channels `keep`, and the channels that it writes."""

    def find(part: str) -> list[str]:
        return [
            n for n, m in modules.items() if isinstance(m, nn.Linear) and re.search(role(model, part), f"layer.0.{n}")
        ]

    def score(names: list[str], columns: Tensor) -> Tensor:
        """(out, kept columns), the product over these layers."""
        return math.prod(scores[id(modules[n].weight)].double()[:, columns] for n in names)  # type: ignore[return-value]

    kept: Kept = {}
    streams = [keep]  # what each part of the layer reads
    for query, key, value, output in zip(*map(find, ("query", "key", "value", "attention_output")), strict=True):
        fused = score([query], keep).chunk(3) if query == key else None
        asked, own = heads(model, fused or [score([n], keep) for n in (query, key, value)], k)
        if fused:
            rows = len(fused[0])
            kept[query] = (torch.cat([asked, rows + own, 2 * rows + own]), keep)
        else:
            kept |= {query: (asked, keep), key: (own, keep), value: (own, keep)}
        keep = top(score([output], asked).sum(1), k)
        kept[output] = (keep, asked)
        streams.append(keep)
    inner = top(score(find("mlp_input"), keep).sum(1), k)
    end = top(score(find("mlp_output"), inner).sum(1), k)
    kept |= dict.fromkeys(find("mlp_input"), (inner, keep)) | dict.fromkeys(find("mlp_output"), (end, inner))
    return kept | norms(list(modules), streams, end), end


def heads(model: Any, scores: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The channels to keep of all heads' queries, and of their keys and values, from scores (out, in) of the three."""
    query, key, value = scores
    count, pairs = model.config.num_attention_heads, 2 if getattr(model.config, "rope_parameters", None) else 1
    groups = count * len(key) // len(query)  # heads of keys and values
    shared = query.view(groups, count // groups, -1, query.shape[1]).mean(1)
    shared = shared * (key * value).view(groups, -1, query.shape[1])
    inside = torch.stack([top(s, k, pairs) for s in shared.sum(2)])  # (groups, kept channels) of a head's
    of_heads, size = inside.repeat_interleave(count // groups, 0), shared.shape[1]
    asked, own = (i + size * torch.arange(len(i), device=i.device)[:, None] for i in (of_heads, inside))
    return asked.flatten(), own.flatten()


def norms(names: list[str], streams: list[Tensor], end: Tensor) -> Kept:
    """What the norms among the modules `names` of a layer keep."""
    found = {
        n: channels
        for n in names
        for p, channels in zip(NORMS, (streams[0], streams[-1], end), strict=True)
        if re.search(p, n)
    }
    found |= {n: streams[int(n.split(".")[1])] for n in names if re.search(r"^layer\.\d\.layer_norm$", n)}
    return {n: (channels, None) for n, channels in found.items()}


def top(scores: Tensor, k: int, pairs: int = 1) -> Tensor:
    """Which k-th part of `scores` is the largest, in order; with pairs=2 channel i goes with i + half."""
    folded = scores.view(pairs, -1).sum(0)
    best = folded.topk(len(folded) // k).indices.sort().values
    return torch.cat([best + i * len(folded) for i in range(pairs)])


def copy_part(wide: Any, small: Any, rows: Tensor, columns: Tensor | None) -> None:
    """Copy those rows and columns of a linear layer or norm."""
    weight = wide.weight[rows] if columns is None else wide.weight[rows][:, columns]
    small.weight.copy_(weight.T if type(small).__name__ == "Conv1D" else weight)
    if getattr(wide, "bias", None) is not None:
        small.bias.copy_(wide.bias[rows])
