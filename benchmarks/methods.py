"""A training step of each method: seconds against another implementation or full fine-tuning, FLOPs and kept bytes against the floor.

python -m benchmarks.methods [--methods lora,dora] [--rounds 5] [--steps 10] [--device cpu]

An encoder of 6 layers x 384 with random weights (BERT), 16 rows of 64 tokens, AdamW. Both sides take turns step by step in
one process, so that a slow moment hits both; a round is --steps steps of each, and the table shows the median of the rounds'
ratios with the lowest and highest. "x forward": seconds over those of the frozen model's forward. FLOPs of a step and MiB
that autograd keeps for its backward are counted; "x floor" is over what no adapter can avoid (`benchmarks.floor`), "x other"
over the other side's. `--rounds 0` shows what is counted alone.

The other side is `peft` where it has the method, or a tuner of the same products (LORA for `dylora`, `lora_plus`, `sora`; SHIRA
for `apet`), the authors' `galore-torch` where that is installed, and else full fine-tuning. All have torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.model import freeze
from bench.random_models import HEADS
from benchmarks.floor import counted, floor
from methods import METHODS, Method, Unsupported

QV = ["query", "value"]
FFN = [f"encoder.layer.{i}.output.dense" for i in range(6)]
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": QV}
EVERY = r".*\.layer\..*\.(query|key|value|dense)"
PEFT: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # ours -> our fields, peft's tuner and its config
    "lora": ({}, "LORA", LORA),
    "lora_plus": ({}, "LORA", LORA),
    "lora_freeze_a": ({}, "LORA", LORA),
    "dylora": ({}, "LORA", LORA),
    "sora": ({}, "LORA", LORA | {"target_modules": EVERY}),
    "dora": ({}, "LORA", LORA | {"use_dora": True}),
    "apet": ({"targets": "query_value"}, "SHIRA", {"r": 8, "target_modules": QV}),
    "pissa": ({"rank": 16}, "LORA", {"r": 16, "lora_alpha": 16, "target_modules": QV, "init_lora_weights": "pissa"}),
    "ia3": ({}, "IA3", {"target_modules": ["key", "value", *FFN], "feedforward_modules": FFN}),
    "ln_tuning": ({}, "LN_TUNING", {"target_modules": ["LayerNorm"]}),
    "vera": ({"rank": 256}, "VERA", {"r": 256, "target_modules": QV}),
    "adalora": ({"targets": "query_value"}, "ADALORA", {"total_step": 10**6, "target_modules": QV}),
    "oft": ({"block": 32}, "OFT", {"r": 0, "oft_block_size": 32, "target_modules": QV, "use_cayley_neumann": False}),
    "miss": ({"rank": 64}, "MISS", {"r": 64, "target_modules": QV}),
    "prompt_tuning": ({"length": 20}, "PROMPT_TUNING", {"task_type": "SEQ_CLS", "num_virtual_tokens": 20}),
    "prefix_tuning": ({"hidden": None}, "PREFIX_TUNING", {"task_type": "SEQ_CLS", "num_virtual_tokens": 10}),
}  # fmt: skip
FROZEN = {"lora_freeze_a": "lora_A"}  # what `peft` would train


def encoder(seed: int = 0) -> nn.Module:
    """The frozen encoder with its trainable head."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    freeze(model, HEADS)
    return model.train()


def batch(device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30000, (16, 64), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}
    return {k: v.to(device) for k, v in rows.items()}


def stepper(
    model: nn.Module, rows: dict[str, torch.Tensor], method: Any = None, optimizer: Any = None
) -> Callable[[], None]:
    """A function that does one training step, with the method's own optimizer, penalty and hook where there is one."""
    optimizer = optimizer or (method or Method()).optimizer(model, 1e-4, 0.0)
    steps = itertools.count()

    def closure() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**rows).loss
        loss = loss + method.penalty(model) if method else loss
        if torch.is_grad_enabled():
            loss.backward()
        return loss

    def step() -> None:
        optimizer.step(torch.enable_grad()(closure) if method is None or method.backward else closure)
        if method:
            method.after_step(model, next(steps), 10**6)

    return step


@dataclass
class Side:
    """One implementation: a function that does a step, and what a step costs as counted."""

    step: Callable[[], None]
    cost: dict[str, int]


def ours(name: str, rows: dict[str, torch.Tensor], device: str) -> Side:
    method = METHODS[name](**PEFT.get(name, ({},))[0])
    model = method.apply(encoder(), itertools.repeat(rows)).to(device)
    return Side(stepper(model, rows, method), counted(model, rows, method))


def other(name: str, rows: dict[str, torch.Tensor], device: str) -> tuple[str, Side]:
    """The side that a method is compared with, and its name."""
    if name in PEFT:
        return f"peft {PEFT[name][1]}", peft_side(name, rows, device)
    if name == "galore" and importlib.util.find_spec("galore_torch"):
        return "galore-torch", galore_side(rows, device)
    return "full_ft", ours("full_ft", rows, device)


def galore_side(rows: dict[str, torch.Tensor], device: str) -> Side:
    """The authors' optimizer on the same model, with the projections and the groups of ours."""
    from galore_torch import GaLoreAdamW

    galore, model = METHODS["galore"](), encoder().requires_grad_().to(device)
    others, projected = (group["params"] for group in galore.optimizer(model, 1e-4, 0.0).param_groups)
    own = {"rank": galore.rank, "update_proj_gap": galore.every, "scale": galore.scale, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": others}, {"params": projected} | own], lr=1e-4, no_deprecation_warning=True)
    return Side(stepper(model, rows, optimizer=optimizer), counted(model, rows))


def peft_side(name: str, rows: dict[str, torch.Tensor], device: str) -> Side:
    import peft

    _, kind, config = PEFT[name]
    mapping, model = peft.mapping, encoder()
    head = [p for p in model.parameters() if p.requires_grad]
    model = peft.get_peft_model(model, mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](**config))
    for p in head:
        p.requires_grad_()
    for p in [p for n, p in model.named_parameters() if name in FROZEN and FROZEN[name] in n]:
        p.requires_grad_(False)
    model = model.to(device).train()
    return Side(stepper(model, rows), counted(model, rows))


def forward(rows: dict[str, torch.Tensor], device: str) -> Callable[[], None]:
    model = encoder().to(device)

    def step() -> None:
        with torch.no_grad():
            model(**rows)

    return step


def ratios(sides: list[Callable[[], None]], rounds: int, steps: int, device: str) -> Iterator[list[float]]:
    """For each round the median seconds of each side, taken in turns."""
    for side in sides:
        for _ in range(3):
            side()
    for _ in range(rounds):
        seconds: list[list[float]] = [[] for _ in sides]
        for _, (i, side) in itertools.product(range(steps), enumerate(sides)):
            start = time.perf_counter()
            side()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[i].append(time.perf_counter() - start)
        yield [statistics.median(s) for s in seconds]


def seconds(sides: list[Callable[[], None]], rounds: int, steps: int, device: str) -> str:
    """The columns of the table that are measured; dashes for no rounds."""
    if not rounds:
        return f"{'-':>8} {'-':>6} {'-':>6} {'-':>7} {'-':>9}"
    found = list(ratios(sides, rounds, steps, device))
    to_other, to_forward = [a / b for a, b, _ in found], [a / c for a, _, c in found]
    own = statistics.median(a for a, _, _ in found) * 1000
    values = (own, statistics.median(to_other), min(to_other), max(to_other), statistics.median(to_forward))
    return "{:8.1f} {:6.2f} {:6.2f} {:7.2f} {:9.2f}".format(*values)


def counts(one: dict[str, int], other: dict[str, int], low: dict[str, int]) -> str:
    """The columns that are counted: FLOPs over the floor; MiB kept for the backward, over the floor and the other side."""
    kept = one["activations"]
    values = (one["train_step"] / low["train_step"], kept / 2**20, kept / low["activations"])
    return "{:7.3f} {:9.1f} {:7.2f}".format(*values) + f" {kept / other['activations']:7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names, comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of each side in a round")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    names = args.methods.split(",") if args.methods else sorted(set(METHODS) - {"hf", "compose", "zero_shot"})
    rows = batch(args.device)
    low = floor(encoder().to(args.device), rows)
    threads = f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {args.device}, {threads}, {args.rounds} x {args.steps} steps")
    print(f"floor: {low['train_step'] / 1e9:.2f} GFLOPs, {low['activations'] / 2**20:.1f} MiB kept")
    print(f"{'':31} {'seconds':->38}   {'FLOPs':->7} {'kept for the backward':->25}")
    print(
        f"{'method':18} {'against':12} {'ms':>8} {'ratio':>6} {'lowest':>6} {'highest':>7} {'x forward':>9} "
        f"{'x floor':>8} {'MiB':>9} {'x floor':>7} {'x other':>7}"
    )
    for name in names:
        try:
            own, (against, rival) = ours(name, rows, args.device), other(name, rows, args.device)
        except Unsupported as reason:
            print(f"{name:18} does not act on this encoder: {reason}")
            continue
        sides = [own.step, rival.step, forward(rows, args.device)]
        measured = seconds(sides, args.rounds, args.steps, args.device)
        print(f"{name:18} {against:12.12} {measured}  {counts(own.cost, rival.cost, low)}", flush=True)


if __name__ == "__main__":
    main()
