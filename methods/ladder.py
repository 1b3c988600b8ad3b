"""The network of `lst`: narrow blocks beside a frozen backbone, that read its hidden states through ladders."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from methods.base import Added, Unsupported, new_parameter, placement, reads

if TYPE_CHECKING:
    from methods.lst import LST

WIDTHS = ("hidden_size", "intermediate_size", "hidden_dim", "d_ff", "head_dim")  # the FFN of DistilBERT, of T5
NORMS = ("norm", "ln_f", "layernorm", "final_layer_norm")  # of a backbone, after its last layer


class Ladder(Added):
    """Side blocks of width d / k: h_s <- Block(mu h_s + (1 - mu) Down(h)), mu = sigmoid(alpha / T), h the backbone's.

    The backbone runs first and whole, while what its first layer is given and what those beside a side block return is
    noted down; the rest happens in `climb`.
    """

    def __init__(self, stack: Any, layers: list[Any], method: LST):
        super().__init__()
        config, like, norm = narrow(stack.config, method.reduction), layers[0], last_norm(stack)
        d, width = stack.config.hidden_size, config.hidden_size
        self.rungs = [i for i in range(len(layers)) if not (method.drop and len(layers) > 1 and i % method.drop == 0)]
        with torch.device(placement(like)["device"]):
            self.first, self.up = nn.Linear(d, width), nn.Linear(width, d)
            self.downs = nn.ModuleList(nn.Linear(d, width) for _ in self.rungs)
            self.blocks = nn.ModuleList(self.block(layers[i], config, i) for i in self.rungs)
            rotary = getattr(stack, "rotary_emb", None)
            self.rotary = None if rotary is None else type(rotary)(config)
            self.norm = None if norm is None else narrow_norm(norm, width)
        module: Any
        for module in self.blocks.modules():  # keys and values are cached behind those of the backbone
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx += len(layers)
        self.apply(stack._init_weights)
        self.to(**placement(like))
        self.gates = new_parameter(like, len(self.rungs))
        self.temperature, self.depth = method.temperature, len(layers)
        self.notes: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        self.turns: tuple[Tensor, Tensor] | None = None  # of the narrow heads, for all side blocks

    def block(self, layer: Any, config: Any, index: int) -> Any:
        """A narrow block of the backbone's own class."""
        try:
            return type(layer)(config, layer_idx=index)
        except TypeError:  # encoders without a cache
            return type(layer)(config)

    def attach(self, stack: Any, layers: list[Any], container: nn.Module) -> None:
        """Hook it to the backbone: to what its layers are given and return, and to what ends it."""
        self.watch(layers)
        (last_norm(stack) or container).register_forward_hook(self.finish)

    def watch(self, layers: list[Any]) -> None:
        """Hook it to the input of the first layer, and to the output of each that has a side block."""
        layers[0].register_forward_pre_hook(self.begin)
        for i in self.rungs:
            layers[i].register_forward_hook(self.note, with_kwargs=True)

    @reads
    def begin(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the first layer: whatever made its input, no gradient passes it."""
        self.notes = [((), {}, inputs[0].detach())]
        return (self.notes[0][2], *inputs[1:])

    @reads
    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of a layer."""
        self.notes.append((args[1:], kwargs, output[0] if isinstance(output, tuple) else output))

    def finish(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook of what ends the backbone: Up(h_s) takes the place of its last hidden states."""
        if isinstance(output, Tensor):
            return self.climb().to(output.dtype)
        output.last_hidden_state = self.climb().to(output.last_hidden_state.dtype)
        return output

    def climb(self) -> Tensor:
        """Up(h_s), (..., d)."""
        return self.up(self.side())

    def side(self) -> Tensor:
        """h_s of the side network on what was noted down, (..., d / k)."""
        ((_, _, below), *notes), self.notes, dtype = self.notes, [], self.first.weight.dtype
        self.turns = None
        h = self.first(below.to(dtype))
        mu = torch.sigmoid(self.gates / self.temperature)
        steps = zip(range(len(mu)), self.rungs, notes, self.downs, self.blocks, strict=True)
        for i, rung, (args, kwargs, below), down, layer in steps:
            lengthen_cache((*args, *kwargs.values()), self.depth + rung)
            h = mu[i] * h + (1 - mu[i]) * down(below.to(dtype))
            h = self.run(layer, h, args, kwargs)
        return h if self.norm is None else self.norm(h)

    def run(self, layer: Any, h: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A side block on h, beside whatever else the backbone's layer was given."""
        if self.rotary is not None:
            self.turns = self.turns or self.rotary(h, kwargs["position_ids"])
            kwargs = kwargs | {"position_embeddings": self.turns}
        return layer(h, *args, **kwargs)


class T5Ladder(Ladder):
    """Beside one stack of T5: with position biases of its own, and cross-attention to the side encoder.

    The side encoder's states (..., d / k) stand behind the backbone's in one tensor (..., d + d / k), so that they go
    wherever these go, into a cache or to beams. Only the decoder's are brought up.
    """

    def __init__(self, stack: Any, layers: list[Any], method: LST):
        super().__init__(stack, layers, method)
        self.dropout = nn.Dropout(stack.config.dropout_rate)
        self.biases: list[Tensor | None] = []
        self.below: Tensor | None = None
        if not stack.is_decoder:
            del self.up

    def block(self, layer: Any, config: Any, index: int) -> Any:
        """The first block that is kept has the position bias that the others take."""
        return type(layer)(config, has_relative_attention_bias=index == self.rungs[0], layer_idx=index)

    def attach(self, stack: Any, layers: list[Any], container: nn.Module) -> None:
        self.watch(layers)
        stack.register_forward_pre_hook(self.part, with_kwargs=True)
        stack.register_forward_hook(self.finish)

    def part(self, stack: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of a stack: take the side encoder's states from behind the backbone's."""
        self.biases = [None, None]
        if stack.is_decoder:
            both, d = kwargs["encoder_hidden_states"], stack.config.d_model
            self.below = both[..., d:]
            kwargs = kwargs | {"encoder_hidden_states": both[..., :d].detach()}
        return args, kwargs

    def finish(self, stack: Any, inputs: Any, output: Any) -> Any:
        """Forward hook of a stack, whose narrow norm has a dropout behind it."""
        h, wide = self.dropout(self.side()).to(output.last_hidden_state.dtype), output.last_hidden_state.detach()
        output.last_hidden_state = self.up(h) if stack.is_decoder else torch.cat([wide, h], -1)
        self.below = None
        return output

    def run(self, layer: Any, h: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        mask, _, _, mask_below, _ = args
        h, *self.biases = layer(h, mask, self.biases[0], self.below, mask_below, self.biases[1], **kwargs)
        return h


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


def last_norm(stack: nn.Module) -> nn.Module | None:
    """The norm behind a backbone's last layer, where it has one."""
    return next((getattr(stack, n) for n in NORMS if hasattr(stack, n)), None)


def narrow_norm(norm: nn.Module, width: int) -> nn.Module:
    """A norm of the same kind and epsilon."""
    return type(norm)(width, eps=getattr(norm, "variance_epsilon", None) or norm.eps)  # type: ignore[call-arg]


def lengthen_cache(values: tuple[Any, ...], index: int) -> None:
    """Make room for layer `index` in the key-value cache among `values`, if there is one."""
    for cache in values:
        if hasattr(cache, "cross_attention_cache"):
            lengthen_cache((cache.self_attention_cache, cache.cross_attention_cache), index)
        elif hasattr(cache, "get_seq_length"):
            from transformers.cache_utils import DynamicLayer

            while len(cache.layers) <= index:
                cache.layers.append(DynamicLayer())
