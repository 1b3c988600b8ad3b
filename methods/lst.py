"""LST: a narrow network beside a frozen backbone, without a gradient through it. Sung et al., arxiv.org/abs/2206.06522"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.architectures import role
from methods.base import Added, Batch, Method, Unsupported, new_parameter, placement, register, searched
from methods.pruned_start import fisher, magnitude, start_blocks

STACKS = ("bert", "roberta", "distilbert", "vit", "deit", "llama", "qwen2", "qwen3", "gpt2")
WIDTHS = ("hidden_size", "intermediate_size", "hidden_dim", "head_dim")  # hidden_dim: DistilBERT's FFN
STARTS = ("fisher", "magnitude", "random")
NORMS = ("norm", "ln_f", "layernorm")  # of a backbone, after its last layer


class Ladder(Added):
    """Side blocks of width d / k: h_s <- Block(mu h_s + (1 - mu) Down(h)), mu = sigmoid(alpha / T), h the backbone's.

    The backbone runs first and whole, while its layers' inputs and outputs are noted down; the rest happens in `climb`.
    """

    def __init__(self, model: Any, layers: list[Any], norm: nn.Module | None, method: LST):
        super().__init__()
        config, like = narrow(model.config, method.reduction), layers[0]
        d, width = model.config.hidden_size, config.hidden_size
        self.rungs = [i for i in range(len(layers)) if not (method.drop and len(layers) > 1 and i % method.drop == 0)]
        with torch.device(placement(like)["device"]):
            self.first, self.up = nn.Linear(d, width), nn.Linear(width, d)
            self.downs = nn.ModuleList(nn.Linear(d, width) for _ in self.rungs)
            self.blocks = nn.ModuleList(block(layers[i], config, i, len(layers)) for i in self.rungs)
            rotary = getattr(model.base_model, "rotary_emb", None)
            self.rotary = None if rotary is None else type(rotary)(config)
            self.norm = None if norm is None else narrow_norm(norm, width)
        self.apply(model._init_weights)
        self.to(**placement(like))
        self.gates = new_parameter(like, len(self.rungs))
        self.temperature = method.temperature
        self.notes: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def begin(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the first layer: whatever made its input, no gradient passes it."""
        self.notes = [((), {}, inputs[0].detach())]
        return (self.notes[0][2], *inputs[1:])

    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of every layer."""
        self.notes.append((args[1:], kwargs, output[0] if isinstance(output, tuple) else output))

    def finish(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook of what ends the backbone: Up(h_s) takes the place of its last hidden states."""
        if isinstance(output, Tensor):
            return self.climb().to(output.dtype)
        output.last_hidden_state = self.climb().to(output.last_hidden_state.dtype)
        return output

    def climb(self) -> Tensor:
        """The side network on what was noted down, (..., d)."""
        notes, self.notes, dtype = self.notes, [], self.up.weight.dtype
        h = self.first(notes[0][2].to(dtype))
        mu = torch.sigmoid(self.gates / self.temperature)
        for i, rung, down, layer in zip(range(len(mu)), self.rungs, self.downs, self.blocks, strict=True):
            args, kwargs, below = notes[1 + rung]
            lengthen_cache((*args, *kwargs.values()), len(notes) - 1 + rung)
            h = mu[i] * h + (1 - mu[i]) * down(below.to(dtype))
            if self.rotary is not None:
                kwargs = kwargs | {"position_embeddings": self.rotary(h, kwargs["position_ids"])}
            h = layer(h, *args, **kwargs)
        return self.up(h if self.norm is None else self.norm(h))


def narrow(config: Any, k: int) -> Any:
    """The configuration of the side blocks: as many heads, all widths divided by k. Raises `Unsupported` otherwise."""
    small = copy.deepcopy(config)
    for name in WIDTHS:
        if isinstance(value := getattr(config, name, None), int):
            if value % k:
                raise Unsupported(f"method.reduction={k} does not divide {name}={value} of this model")
            setattr(small, name, value // k)
    head = getattr(small, "head_dim", None) or small.hidden_size / small.num_attention_heads
    if head % (2 if getattr(config, "rope_parameters", None) else 1):
        raise Unsupported(
            f"method.reduction={k} leaves {small.hidden_size} channels to {small.num_attention_heads} heads, "
            "which a block of this model cannot split evenly; choose a smaller one"
        )
    return small


def block(layer: Any, config: Any, index: int, count: int) -> Any:
    """A narrow block of the backbone's own class; its keys and values are cached behind those of `count` layers."""
    try:
        small = type(layer)(config, layer_idx=index)
    except TypeError:  # encoders without a cache
        small = type(layer)(config)
    for module in small.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx = count + index
    return small


def narrow_norm(norm: nn.Module, width: int) -> nn.Module:
    """A norm of the same kind and epsilon."""
    return type(norm)(width, eps=getattr(norm, "variance_epsilon", None) or norm.eps)  # type: ignore[call-arg]


def lengthen_cache(values: tuple[Any, ...], index: int) -> None:
    """Make room for layer `index` in the key-value cache among `values`, if there is one."""
    for cache in values:
        if hasattr(cache, "get_seq_length"):
            from transformers.cache_utils import DynamicLayer

            while len(cache.layers) <= index:
                cache.layers.append(DynamicLayer())


@register
@dataclass
class LST(Method):
    """Sections 3.1 to 3.4: ladders lead from the backbone's hidden states to a side network; its output, brought up to
    the backbone's width, goes to the backbone's own head.

    mu weighs the side's state as in the official code, where the paper's weighs the backbone's: the same functions with
    alpha of the other sign. The backbone's final norm is replaced by a narrow one, as there. `start` is that of the side
    blocks; see `pruned_start.py`.
    """

    lr: ClassVar[float] = 3e-3  # official script for T5-base
    family: ClassVar[str] = "side network"
    acts: ClassVar[str] = "beside the backbone"
    formula: ClassVar[str] = "blocks of width d / k, and (L + 2) ladders d^2 / k"
    neutral: ClassVar[bool] = False  # the head reads the side network

    reduction: int = searched(8, (4, 8, 16))  # k; searched: around it
    drop: int = 4  # every so many-th side block is left out, from the first on (T5-base); 0 keeps all
    temperature: float = 0.1  # T
    start: str = "fisher"  # of the side blocks: pruned by Fisher information or `magnitude`, or `random`
    fisher_samples: int = 1024  # official code

    def __post_init__(self) -> None:
        if self.reduction < 1 or self.drop < 0 or self.drop == 1 or self.temperature <= 0:
            raise ValueError(
                f"method.reduction={self.reduction} must be at least 1, method.drop={self.drop} 0 or at least 2, "
                f"method.temperature={self.temperature} positive"
            )
        if self.start not in STARTS or self.fisher_samples < 1:
            raise ValueError(
                f"method.start={self.start!r}: the options are {', '.join(STARTS)}; "
                f"method.fisher_samples={self.fisher_samples} must be at least 1"
            )

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", "") not in STACKS:
            raise Unsupported(
                f"lst builds narrow blocks for {', '.join(STACKS)}; those of {type(model).__name__} need what it cannot narrow"
            )
        backbone: Any = model.base_model
        names = [n for n, _ in model.named_modules() if re.search(role(model, "layers"), n)]
        layers = [model.get_submodule(n) for n in names]
        norm = next((getattr(backbone, n) for n in NORMS if hasattr(backbone, n)), None)
        scores = self.scores(model, batches)
        backbone.ladder = ladder = Ladder(model, layers, norm, self)
        if scores:
            blocks = dict(zip(ladder.rungs, ladder.blocks, strict=True))
            start_blocks(model, names, blocks, self.reduction, scores)
        layers[0].register_forward_pre_hook(ladder.begin)
        for layer in layers:
            layer.register_forward_hook(ladder.note, with_kwargs=True)
        end = norm if norm is not None else model.get_submodule(names[0].rsplit(".", 2)[0])
        end.register_forward_hook(ladder.finish)
        return model

    def scores(self, model: nn.Module, batches: Iterable[Batch]) -> dict[int, Tensor]:
        """The importance of each weight of the backbone by its id (section 3.3); empty for a random start."""
        if self.start == "random":
            return {}
        return magnitude(model) if self.start == "magnitude" else fisher(model, iter(batches), self.fisher_samples)
