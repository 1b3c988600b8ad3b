"""The largest Llama-shaped model that each method trains in a given memory, ours and peft's.

python -m benchmarks.memory [--memory 8,24,80] [--tokens 2048] [--methods lora,full_ft] [--device cpu]

The models: width d = 128 n, n layers, n heads of 128 with a quarter as many for keys and values, an inner width of 3.5 d,
V = 128,256 words (n = 32 is Llama 3 8B's shape); one row of T tokens, bfloat16, the method's defaults, no autocast: what is
trained beside the frozen weights is in float32, full fine-tuning and its kind stay in bfloat16. Counted, in bytes, at sizes
that take seconds: weights, gradients and optimizer state after a step on torch's meta device; what autograd keeps for the
backward on a CPU. Between and beyond them the two formulas below, which are exact where memory follows the shapes:

  static(d, L, V)      a polynomial of 1, d, d^2, V, V d, L, L d, L d^2
  kept(d, L, V, T)     a polynomial of 1, d, V, L, L d, each also times T

With gradient checkpointing (of every block) the peak is what it keeps, and what one block keeps while it is computed again.
Last columns: what the formulas say of a size that was not fitted, over what is counted there. Not counted: the memory of
kernels for themselves, of the allocator, and of CUDA (0.5 GB or so): a real GPU holds somewhat less. `peft`: peft's own.

Billions of parameters in 24 GiB, without and with checkpointing (torch 2.13, peft 0.21): full_ft 2.4 and 3.0, galore 3.6 and
5.1, lisa 5.2 and 7.6, lora 7.2 and 11.8 (peft's the same), dora 6.8 and 11.7 (peft's 6.6 and 11.7), lst 10.0, mezo 12.9,
qlora 4.6 and 26.1: its dropout keeps a mask and a copy of the input of every linear layer (without it, qlora_plain, 6.9 and
26.7; in 8 bits, qlora_8bit, 6.0 and 17.0). The formulas are exact
to 0.1 % but for lst, whose side blocks round their widths (4 % of what is static, 11 % of what is kept).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import measure
from bench.clock import Phases
from methods import METHODS, Unsupported

HEAD, WORDS = 128, 128_256
OURS = (
    "full_ft",
    "galore",
    "lisa",
    "mezo",
    "lora",
    "dora",
    "ia3",
    "qlora",
    "qlora_plain",
    "qlora_8bit",
    "prompt_tuning",
    "lst",
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora_plain": ("qlora", {"dropout": 0.0}),
    "qlora_8bit": ("qlora", {"dropout": 0.0, "bits": 8}),
}
PEFT: dict[str, dict[str, Any]] = {
    "LORA": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "DORA": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "PROMPT_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20},
}


@dataclass(frozen=True)
class Shape:
    """Width, layers, words and tokens of a model and its row."""

    d: float
    L: float
    V: float = WORDS
    T: float = 2048

    def static(self) -> list[float]:
        """The terms of the formula for weights, gradients and optimizer state."""
        return [1, self.d, self.d**2, self.V, self.V * self.d, self.L, self.L * self.d, self.L * self.d**2]

    def kept(self) -> list[float]:
        """The terms of the formula for what autograd keeps."""
        terms = [1, self.d, self.V, self.L, self.L * self.d]
        return [*terms, *(self.T * t for t in terms)]

    @property
    def parameters(self) -> float:
        """Of the pretrained model: embedding and head, 13 d^2 and two norms per layer, the last norm."""
        return 2 * self.V * self.d + self.L * (13 * self.d**2 + 2 * self.d) + self.d


FITTED = [Shape(d, L, V, T) for d, L, V, T in itertools.product((512, 1024), (3, 5), (512, 1024), (32, 64))]
FITTED += [Shape(1536, 3, 512, 32), Shape(1536, 5, 512, 32)]
UNSEEN, LLAMA_8B = Shape(1536, 6, 768, 80), Shape(4096, 32)
Method = Callable[[nn.Module], "tuple[nn.Module, Any]"]  # a pretrained model to the one to train, and who made it


def pretrained(shape: Shape, device: str, *, checkpointing: bool = False) -> Any:
    """A frozen model of zeros."""
    import transformers

    d = int(shape.d)
    config = transformers.LlamaConfig(
        vocab_size=int(shape.V), hidden_size=d, intermediate_size=d * 7 // 2, num_hidden_layers=int(shape.L),
        num_attention_heads=d // HEAD, num_key_value_heads=d // HEAD // 4, head_dim=HEAD, pad_token_id=0,
        max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if device != "meta":
        model.to_empty(device=device)
        for t in (*model.parameters(), *model.buffers()):
            t.detach().zero_()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.requires_grad_(False)


def ours(name: str) -> Method:
    def apply(model: nn.Module) -> tuple[nn.Module, Any]:
        of, fields = VARIANTS.get(name, (name, {}))
        method = METHODS[of](**fields)
        return method.apply(model, iter(())), method

    return apply


def theirs(kind: str) -> Method:
    def apply(model: Any) -> tuple[nn.Module, Any]:
        import peft

        tuner = peft.PeftType["LORA" if kind == "DORA" else kind]
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[tuner](**PEFT[kind])
        return peft.get_peft_model(model, config), METHODS["lora"]()  # AdamW, no penalty

    return apply


def static(make: Method, shape: Shape) -> int:
    """Bytes of weights, gradients and optimizer state, after a step on the meta device."""
    with torch.device("meta"):
        model, method = make(pretrained(shape, "meta"))
        optimizer = method.optimizer(model, 1e-3, 0.0)

        def closure() -> torch.Tensor:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad and method.backward else None
            return torch.zeros(())

        if method.backward:
            optimizer.step(closure)
            method.after_step(model, 0, 100)
    kinds = measure.memory(model, optimizer, Phases(), activations=0, backward=method.backward)
    return int(kinds["peak"] or 0)


def kept(make: Method, shape: Shape, checkpointing: bool, device: str) -> int:
    """Bytes that autograd keeps for the backward of one row, at the end of the forward."""
    with torch.device(device):
        model, method = make(pretrained(shape, device, checkpointing=checkpointing))
        ids = torch.zeros(1, int(shape.T), dtype=torch.long)
    model.train()
    return measure.saved_bytes(model, lambda: model(input_ids=ids, labels=ids).loss) if method.backward else 0


@dataclass
class Fit:
    """The two formulas of one method."""

    make: Method
    device: str

    def __post_init__(self) -> None:
        still = [s for s in FITTED if s.T == FITTED[0].T]
        self.static = fit([s.static() for s in still], [static(self.make, s) for s in still])
        terms = [s.kept() for s in FITTED]
        self.kept = {c: fit(terms, [kept(self.make, s, c, self.device) for s in FITTED]) for c in (False, True)}

    def bytes(self, shape: Shape, checkpointing: bool) -> float:
        """Predicted peak."""
        found = float(self.static @ shape.static() + self.kept[checkpointing] @ shape.kept())
        one = np.subtract(replace(shape, L=2).kept(), replace(shape, L=1).kept())
        return found + float(self.kept[False] @ one) * checkpointing

    def errors(self) -> tuple[float, float]:
        """Prediction over count, less 1, of what is static at Llama 3 8B's shape, and of what is kept at an unseen size."""
        counted = kept(self.make, UNSEEN, False, self.device)
        of_kept = float(self.kept[False] @ UNSEEN.kept()) / counted - 1 if counted else 0.0
        return float(self.static @ LLAMA_8B.static()) / static(self.make, LLAMA_8B) - 1, of_kept

    def largest(self, memory: float, tokens: int, checkpointing: bool) -> float:
        """Parameters of the largest pretrained model that fits, n taken as a real number."""
        low, high = 0.0, 1000.0
        for _ in range(60):
            middle = (low + high) / 2
            fits = self.bytes(Shape(HEAD * middle, middle, T=tokens), checkpointing) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return Shape(HEAD * low, low).parameters


def fit(terms: list[list[float]], values: list[int]) -> np.ndarray:
    """Coefficients of the terms by least squares, each term scaled to 1 at its largest."""
    table = np.array(terms, float)
    scale = table.max(0)
    return np.linalg.lstsq(table / scale, np.array(values, float), rcond=None)[0] / scale


def table(names: list[str], memory: list[float], tokens: int, device: str) -> Iterator[str]:
    """Header and one line per method."""
    yield f"billions of parameters, one row of {tokens} tokens, bfloat16; counted on meta and {device}"
    sizes = [f"{m:g} GiB" for m in memory]
    yield f"{'':20} {'':>26} {'checkpointing':>26}  {'formula / count - 1':>21}"
    yield f"{'method':20} " + "".join(f"{s:>9}" for s in sizes * 2) + f"  {'static, 8B':>10} {'kept':>10}"
    for name in names:
        kind, _, tuner = name.rpartition(" ")
        try:
            found = Fit(theirs(tuner) if kind else ours(tuner), device)
        except Unsupported as reason:
            yield f"{name:20} {reason}"
            continue
        largest = [found.largest(m * 2**30, tokens, c) for c in (False, True) for m in memory]
        errors = "".join(f"{e:>11.1%}" for e in found.errors())
        yield f"{name:20} " + "".join(f"{n / 1e9:9.2f}" for n in largest) + errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="8,24,80", help="GiB, comma-separated")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--methods", default=",".join([*OURS, *(f"peft {k}" for k in PEFT)]))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    memory = [float(m) for m in args.memory.split(",")]
    for line in table(args.methods.split(","), memory, args.tokens, args.device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
