"""Seconds of eight small runs: at once, in turn, and by transformers' `Trainer` with `peft`; start-up included.

python -m benchmarks.fused [--shapes 128x2 384x6] [--batch 4] [--rows 400] [--epochs 2] [--rounds 3]

LoRA r8 on query and value of a RoBERTa with random weights and its usual dropout, four learning rates and two seeds, sentences
whose lengths are spread as SST-2's, val after each epoch, test at the end, nothing tracked. Each side of a round is a new
process, imports and all; the sides take turns. `Trainer`: dynamic padding, the rows encoded once for all eight, a new model each.
`fused` may itself use several processes (`conf/hydra/launcher/fused.yaml`); "two Trainers" are two processes of one thread and one
seed each, at the same time: what its user can do by hand.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (0, 1)
SIDES = ("fused", "in turn", "Trainer", "two Trainers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["128x2", "384x6"], help="width x layers")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rows", type=int, default=400, help="of train; val and test have 100 each")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("Trainer",), help=argparse.SUPPRESS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        trainer(Path(args.folder), args)
        return
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            compare(Path(name), shape, args)


def compare(folder: Path, shape: str, args: Any) -> None:
    """Print one line: the sides' seconds and their ratios."""
    write(folder, shape, args.rows)
    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]:
            spent[side].append(seconds(commands(folder, side, number, args)))
    print(f"{shape}: " + ", ".join(f"{side} {statistics.median(spent[side]):.1f} s" for side in SIDES), end="; ")
    print(*(ratio(spent, side) for side in SIDES[:0:-1]), sep="; ", flush=True)


def ratio(spent: dict[str, list[float]], side: str) -> str:
    """The seconds of a side over those of `fused`, round by round."""
    ratios = [b / a for a, b in zip(spent["fused"], spent[side], strict=True)]
    return f"{side} / fused: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"


def commands(folder: Path, side: str, number: int, args: Any) -> list[list[str]]:
    """The processes of a side, which run at the same time."""
    if side == "two Trainers":
        return [theirs(folder, args, seeds=(seed,)) for seed in SEEDS]
    return [theirs(folder, args, seeds=SEEDS) if side == "Trainer" else ours(folder, side, number, args)]


def seconds(commands: list[list[str]]) -> float:
    """Of processes from their start to the last one's end; several have one thread each. Raises SystemExit where one fails."""
    begun = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"OMP_NUM_THREADS": "1"} if len(commands) > 1 else {}
    with tempfile.TemporaryFile("w+") as text:
        started = [subprocess.Popen(c, stdout=text, stderr=subprocess.STDOUT, env=environment) for c in commands]
        codes = [process.wait() for process in started]
        if any(codes):
            text.seek(0)
            raise SystemExit(f"{commands}\n{text.read()[-3000:]}")
    return time.perf_counter() - begun


def ours(folder: Path, side: str, number: int, args: Any) -> list[str]:
    """The command of our eight runs: rows and encodings are not kept from one round to the next."""
    given = {"model.path": folder / "model", "data.root": folder / "data", "results": folder / f"{side[:2]}{number}"}
    given |= {"train.epochs": args.epochs, "train.batch_size": args.batch, "train.lr": ",".join(map(str, RATES))}
    given |= {"seed": ",".join(map(str, SEEDS)), "hydra/launcher": "fused" if side == "fused" else "basic"}
    plain = ["method=lora", "model=roberta_base", "task=sst2", "data=real", "device=cpu", "wandb=off", "~best"]
    plain += ["task.protocol=official", "task.splits.test=test", "train.checkpoint_seconds=null"]
    return [sys.executable, "-m", "bench", "-m", *plain, *(f"{k}={v}" for k, v in given.items())]


def theirs(folder: Path, args: Any, *, seeds: Sequence[int]) -> list[str]:
    values = ["--batch", str(args.batch), "--epochs", str(args.epochs), "--seeds", *map(str, seeds)]
    return [sys.executable, "-m", "benchmarks.fused", "--side", "Trainer", "--folder", str(folder), *values]


def trainer(folder: Path, args: Any) -> None:
    """The trainings by `Trainer`, in this process."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    files = {s: str(next((folder / "data").rglob(f"{s}*.parquet"))) for s in ("train", "validation", "test")}
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
    encoded = rows.map(lambda r: tokenizer(r["sentence"], truncation=True, max_length=128), batched=True)
    for rate in RATES:
        for seed in args.seeds:
            one(folder, encoded, tokenizer, args, rate=rate, seed=seed)


def one(folder: Path, encoded: Any, tokenizer: Any, args: Any, *, rate: float, seed: int) -> None:
    import peft
    import transformers

    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    model = peft.get_peft_model(
        model, peft.LoraConfig("SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    )
    options = transformers.TrainingArguments(
        str(folder / "trainer"), num_train_epochs=args.epochs, per_device_train_batch_size=args.batch, learning_rate=rate, warmup_steps=0.06,
        eval_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=seed, logging_strategy="epoch",
        per_device_eval_batch_size=64,
    )  # fmt: skip
    run = transformers.Trainer(
        model, options, transformers.DataCollatorWithPadding(tokenizer), encoded["train"], encoded["validation"],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
    )  # fmt: skip
    run.train()
    run.predict(encoded["test"])


def write(folder: Path, shape: str, rows: int) -> None:
    """A backbone of this shape, its tokenizer, and rows."""
    import torch
    import transformers

    from benchmarks import training

    width, layers = map(int, shape.split("x"))
    training.write_model(folder / "model")
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=training.WORDS + 4, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, max_position_embeddings=514,
    )  # fmt: skip
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder / "model")
    training.write_rows(folder / "data", {"train": rows, "validation": 100, "test": 100})


if __name__ == "__main__":
    main()
