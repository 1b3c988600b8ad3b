"""Seconds to answer GSM8K's test rows, ours against `generate` in fixed batches of 16, on a model that was just trained.

python -m benchmarks.generation [--rows 64] [--steps 60] [--rounds 5] [--model smollm2_135m]

First LoRA learns for some steps to answer and to end an answer (real rows: `python -m tasks fetch gsm8k`). Then both sides
answer the same questions, in turns: `generate` in the data's order, ours as an evaluation does it (64 rows at a time, longest
first; rows that have ended leave, waiting ones take their places). The texts up to a stop string are compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import matmul


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="of training, 8 rows each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--matmul", default="auto", help="of our side: auto, torch, onednn; generate has torch's")
    args = parser.parse_args()
    config, ready = trained(args)
    rows = list(ready.encoded["test"].rows)
    sides: dict[str, Callable[[], list[str]]] = {
        "ours": lambda: ours(config, ready, rows),
        "generate": lambda: fixed(ready, rows),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    texts: dict[str, list[str]] = {}
    for number in range(args.rounds):
        for side, answer in sorted(sides.items(), reverse=bool(number % 2)):
            start = time.perf_counter()
            texts[side] = answer()
            seconds[side].append(time.perf_counter() - start)
        print({side: round(values[-1], 1) for side, values in seconds.items()}, flush=True)
    same = sum(a == b for a, b in zip(texts["ours"], texts["generate"], strict=True))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["generate"], strict=True)]
    print(f"{same} of {len(rows)} texts are identical; {torch.get_num_threads()} threads, {args.device}")
    print(f"generate / ours: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}; goal 3")


def trained(args: argparse.Namespace) -> tuple[Any, Any]:
    """A LoRA run's configuration and its model, with the rows to answer as its test split."""
    from bench.config import compose
    from bench.evaluate import rebuild
    from bench.run import run

    with tempfile.TemporaryDirectory() as folder:
        values = {"train.steps": args.steps, "task.limit.train": 8 * args.steps, "task.limit.test": args.rows}
        values |= {"task.limit.val": 1, "results": folder, "device": args.device, "matmul": args.matmul}
        named = ["method=lora", f"model={args.model}", "task=gsm8k", "data=real", "wandb=off", "train.batch_size=8"]
        config = compose(
            named + ["task.metric=answer_logprob", "test=locked"] + [f"{k}={v}" for k, v in values.items()]
        )
        record = run(config)
        if record.status != "ok":
            raise SystemExit(f"{record.status}: {record.reason}\n{record.traceback}")
        return rebuild(Path(folder) / record.id, device=args.device)


@torch.inference_mode()
def ours(config: Any, ready: Any, rows: list[Any]) -> list[str]:
    matmul.use(config.matmul)
    order = sorted(range(len(rows)), key=ready.encoded["test"].length, reverse=True)
    size = config.train.eval_batch_size
    prompts = [ready.task._prompt(rows[i], ready.processor) for i in order]
    batches = (prompts[i : i + size] for i in range(0, len(prompts), size))
    found = dict(zip(order, ready.task._generate(ready.model, batches, ready.processor), strict=True))
    return [found[i] for i in range(len(rows))]


@torch.inference_mode()
def fixed(ready: Any, rows: list[Any]) -> list[str]:
    matmul.use("torch")  # as in a process of its own
    task, tokenizer, texts = ready.task, ready.processor, []
    tokenizer.padding_side = "left"
    for i in range(0, len(rows), 16):
        prompts = [task.prompt.format(**row) for row in rows[i : i + 16]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(ready.device)
        limits = {"max_new_tokens": task.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        out = ready.model.generate(**inputs, do_sample=False, repetition_penalty=1.0, **limits)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [task._stopped(text) for text in texts]


if __name__ == "__main__":
    main()
