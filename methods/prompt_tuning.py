"""Prompt tuning: trained embeddings in front of the text's. Lester et al., https://arxiv.org/abs/2104.08691"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Batch, Method, Unsupported, new_parameter, register, searched

STARTS = ("vocabulary", "random")


class Prompt(nn.Module):
    """P, (length, size): a backbone reads [P; E(x)], and what stands above it reads the text's positions alone."""

    def __init__(self, like: nn.Module, length: int, size: int, positions: int | None):
        super().__init__()
        self.values = new_parameter(like, length, size)
        self.length, self.positions = length, positions

    def insert(self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Forward pre-hook: embed the text, put P before it, and lengthen all that belongs to positions.

        Once a key-value cache holds the prompt, the tokens that follow are only told of its length.
        """
        kwargs = dict(zip(inspect.signature(backbone.forward).parameters, args, strict=False)) | kwargs
        cache, p = kwargs.get("past_key_values"), self.length
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = F.pad(kwargs["attention_mask"], (p, 0), value=1)
        places = kwargs.get("position_ids")
        if cache is not None and cache.get_seq_length() > 0:
            return (), kwargs | ({} if places is None else {"position_ids": places + p})
        if places is not None:
            front = torch.arange(p, device=places.device).expand(*places.shape[:-1], -1)
            kwargs["position_ids"] = torch.cat([front, places + p], -1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (p, 0))
        ids, embeds = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
        embeds = backbone.get_input_embeddings()(ids) if embeds is None else embeds
        self.check(p + embeds.shape[1])
        prompt = self.values.to(embeds.dtype).expand(len(embeds), -1, -1)
        return (), kwargs | {"inputs_embeds": torch.cat([prompt, embeds], 1)}

    def check(self, length: int) -> None:
        if self.positions is not None and length > self.positions:
            raise ValueError(
                f"{self.length} prompt tokens and {length - self.length} of text are more than the {self.positions} "
                "positions of this model; lower task.max_length or method.length"
            )

    def remove(self, backbone: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: cut the prompt's positions off, where this call read them."""
        if kwargs.get("inputs_embeds") is not None:
            output.last_hidden_state = output.last_hidden_state[:, self.length :]
        return output

    def skip(self, pooler: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook of a pooler inside the backbone (BERT): the first position is [CLS]'s, not the prompt's."""
        return (inputs[0][:, self.length :],)

    def tell(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of a decoder that attends to the encoded prompt too."""
        mask = kwargs.get("encoder_attention_mask")
        return args, kwargs if mask is None else kwargs | {
            "encoder_attention_mask": F.pad(mask, (self.length, 0), value=1)
        }


@register
@dataclass
class PromptTuning(Method):
    """Section 2: P, as long as `length` tokens, is trained, in front of the embedded input, [P; X].

    The prompt takes the first positions and the text those after it; an encoder-decoder has it in its encoder, where the
    decoder attends to it. In an encoder for classification, which the paper has not, the head reads [CLS] as it was
    pretrained to (as P-tuning v2's code does; `peft` reads the first prompt token there).
    """

    lr: ClassVar[float] = 0.3  # section 3, there with Adafactor
    family: ClassVar[str] = "prompt"
    acts: ClassVar[str] = "the embedded text"
    formula: ClassVar[str] = "p d"
    oracle: ClassVar[str] = "peft"
    neutral: ClassVar[bool] = False  # a prompt takes attention from the text at once

    length: int = searched(100, (1, 5, 20, 100, 150))  # section 3.2
    start: str = "vocabulary"  # embeddings of sampled tokens, or random in [-0.5, 0.5]; the paper prefers class names
    vocabulary: int = 5000  # sampled are the first so many tokens, T5's most common ones

    def __post_init__(self) -> None:
        if self.length < 1 or self.vocabulary < 1:
            raise ValueError(f"method.length={self.length} and method.vocabulary={self.vocabulary} must be at least 1")
        if self.start not in STARTS:
            raise ValueError(f"method.start={self.start!r}: the options are {', '.join(STARTS)}")

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        whole: Any = model
        words = whole.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if not isinstance(words, nn.Embedding):
            raise Unsupported(f"a prompt stands in front of a text, which {type(model).__name__} does not read")
        seq2seq = model.config.is_encoder_decoder  # type: ignore[union-attr]
        backbone = whole.get_encoder() if seq2seq else whole.base_model
        backbone.prompt = prompt = Prompt(words, self.length, words.embedding_dim, _positions(backbone))
        with torch.no_grad():
            prompt.values.copy_(self.first(words))
        backbone.register_forward_pre_hook(prompt.insert, with_kwargs=True)
        if seq2seq:
            whole.get_decoder().register_forward_pre_hook(prompt.tell, with_kwargs=True)
            return model
        backbone.register_forward_hook(prompt.remove, with_kwargs=True)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler.register_forward_pre_hook(prompt.skip)
        return model

    def first(self, words: nn.Embedding) -> Tensor:
        """What P starts from, (length, size) (section 3.2)."""
        if self.start == "vocabulary":
            ids = torch.randint(min(self.vocabulary, words.num_embeddings), (self.length,))
            return words(ids.to(words.weight.device))
        return torch.empty(self.length, words.embedding_dim, device=words.weight.device).uniform_(-0.5, 0.5)


def _positions(backbone: nn.Module) -> int | None:
    """How many positions a learned table of them has; None for a model that computes them (rotary, relative)."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe")):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
