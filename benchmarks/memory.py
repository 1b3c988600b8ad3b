"""The largest Llama-shaped model that each method trains in a given memory, ours and peft's.

python -m benchmarks.memory [--memory 8,24,80] [--tokens 2048] [--methods lora,full_ft] [--device cpu]

The models: width d = 128 n, n layers, n heads of 128 with a quarter as many for keys and values, an inner width of 3.5 d,
V = 128,256 words (n = 32 is Llama 3 8B's shape); one row of T tokens, bfloat16, the method's defaults, no autocast: what is
trained beside the frozen weights is in float32, full fine-tuning and its kind stay in bfloat16. Counted, in bytes, at sizes
that take seconds: weights, gradients and optimizer state after a step on torch's meta device; what autograd keeps for the
backward on a CPU. Between and beyond them the two formulas below, which are exact where memory follows the shapes:

  static(d, L, V)      a polynomial of 1, d, d^2, V, V d, L, L d, L d^2
  kept(d, L, V, T)     a polynomial of 1, d, V, L, L d, each also times T

The peak is what is static, what is kept, and the more of two things: with gradient checkpointing (of every block) what one
block keeps while it is computed again; while the loss is differentiated its own gradient and that of the logits, in float32, 8
bytes per token and word (without a backward pass the logits and their logarithms, 10). With `train.offload` what is kept waits in
the host's memory, but for what one block, or the head, keeps. For LoRA these are all bytes that live at once, counted operation by
operation on a CPU (`tests/test_benchmarks.py`); nothing was measured on a GPU yet. Not counted: the one weight that qlora builds
out of its codes at a time, the memory of kernels for themselves, of the allocator, and of CUDA (0.5 GB or so): a real GPU holds
somewhat less. Last columns: what the formulas say of a size that was not fitted, over what is counted there.

`peft`: peft's own. Its QLORA is LoRA with our qlora's values over the 4-bit layers of bitsandbytes, where that is installed;
QLORA_FP32 the same after `prepare_model_for_kbit_training`, which its guide has.

Billions of parameters in 24 GiB: plain, with checkpointing, with offload as well (torch 2.13, peft 0.21, bitsandbytes 0.50):

  full_ft 2.2, 2.8, 2.8    galore 3.2, 4.7, 4.8    lisa 4.7, 6.9, 7.1    mezo 11.6    lst 9.2, 9.2, 10.3
  lora 6.5, 10.9, 11.3 (peft the same)     dora 6.1, 10.9, 11.2 (peft 6.0, 10.9, 11.2)
  ia3 6.5, 11.0, 11.3 (peft 6.0, 11.0, 11.3)     prompt_tuning 7.0, 10.9, 11.3 (peft 7.1, 10.9, 11.3)
  qlora 4.1, 25.2, 26.9 (peft QLORA the same; QLORA_FP32 3.0, 20.0, 22.6): its dropout keeps a mask and a copy of the input of
  every linear layer; without it, qlora_plain, 6.1, 25.2, 26.9; in 8 bits, qlora_8bit, 5.3, 16.0, 16.7

Offload is for long rows: with 32,768 tokens in 80 GiB lora 1.0, 11.7, 17.3, qlora 0.4, 20.5, 44.1. A weight takes qlora 4.127
bits, as in bitsandbytes, which keeps 1,088 bytes of code books with each matrix besides. The formulas are exact to 0.1 % but for
lst, whose side blocks round their widths (4 % of what is static, 11 % of what is kept).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench import measure
from bench.live import kinds
from benchmarks.sides import HEAD, OURS, PEFT, Method, ours, pretrained, theirs
from methods import Unsupported

WORDS = 128_256
LOSS = {True: 8, False: 10}  # bytes per token and word beyond what is kept, with a backward pass and without: see above
WAYS = {"": (False, False), "checkpointing": (True, False), "and offload": (True, True)}


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


def static(make: Method, shape: Shape) -> int:
    """Bytes of weights, gradients and optimizer state, after a step on the meta device."""
    with torch.device("meta"):
        model, method = make(pretrained(shape, "meta"))
        return sum(kinds(model, method).values())


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
        self.loss = LOSS[bool(self.kept[False].any())]

    def bytes(self, shape: Shape, checkpointing: bool, offload: bool = False) -> float:
        """Predicted peak."""
        one = np.subtract(replace(shape, L=2).kept(), replace(shape, L=1).kept())
        block, loss = float(self.kept[False] @ one) * checkpointing, self.loss * shape.V * shape.T
        kept = float(self.kept[checkpointing] @ (replace(shape, L=0) if offload else shape).kept())
        there = max(block, kept + loss) if offload else kept + max(block, loss)
        return float(self.static @ shape.static()) + there

    def errors(self) -> tuple[float, float]:
        """Prediction over count, less 1, of what is static at Llama 3 8B's shape, and of what is kept at an unseen size."""
        counted = kept(self.make, UNSEEN, False, self.device)
        of_kept = float(self.kept[False] @ UNSEEN.kept()) / counted - 1 if counted else 0.0
        return float(self.static @ LLAMA_8B.static()) / static(self.make, LLAMA_8B) - 1, of_kept

    def largest(self, memory: float, tokens: int, checkpointing: bool, offload: bool = False) -> float:
        """Parameters of the largest pretrained model that fits, n taken as a real number."""
        low, high = 0.0, 1000.0
        for _ in range(60):
            middle = (low + high) / 2
            fits = self.bytes(Shape(HEAD * middle, middle, T=tokens), checkpointing, offload) <= memory
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
    sizes, width = [f"{m:g} GiB" for m in memory], max(9, 15 // len(memory))
    yield f"{'':20} " + "".join(f"{way:>{width * len(sizes)}}" for way in WAYS) + f"  {'formula / count - 1':>21}"
    yield f"{'method':20} " + "".join(f"{s:>{width}}" for s in sizes * len(WAYS)) + f"  {'static, 8B':>10} {'kept':>10}"
    for name in names:
        kind, _, tuner = name.rpartition(" ")
        try:
            found = Fit(theirs(tuner) if kind else ours(tuner), device)
        except Unsupported as reason:
            yield f"{name:20} {reason}"
            continue
        largest = [found.largest(m * 2**30, tokens, *way) for way in WAYS.values() for m in memory]
        errors = "".join(f"{e:>11.1%}" for e in found.errors())
        yield f"{name:20} " + "".join(f"{n / 1e9:{width}.2f}" for n in largest) + errors


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
