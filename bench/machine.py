"""What a plan must know of a machine: FLOP/s and memory of a named GPU, or of this one, measured in a few seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

# dense peaks in FLOP/s of the makers' data sheets, and GiB: fp32 on CUDA cores, bf16 (T4: fp16) on tensor cores
GPUS = {
    "t4": (8.1e12, 65e12, 15),
    "rtx4090": (82.6e12, 165.2e12, 24),
    "a100": (19.5e12, 312e12, 80),
    "h100": (66.9e12, 989.4e12, 80),
}
SHARE = 0.3  # of a GPU's peak that training reaches


def own_memory() -> int | None:
    """Bytes of this machine's GPU; None without one."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def gpu_rate(gpu: str, precision: str, share: float) -> float:
    """FLOP/s of a GPU: a share of its peak in the precision of the matrix products."""
    return GPUS[gpu][precision != "fp32"] * share


@cache
def calibrate(seconds: float = 2.0) -> float:
    """FLOP/s of training steps on this machine: a BERT of 2 x 384, batches of 8 x 64, random weights."""
    import torch
    import transformers

    from bench import measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = dict(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536, vocab_size=1000)
    with torch.random.fork_rng():
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).to(device).eval()  # type: ignore[arg-type]
    batch = {"input_ids": torch.ones(8, 64, dtype=torch.long), "labels": torch.zeros(8, dtype=torch.long)}
    batch = {k: v.to(device) for k, v in batch.items()}
    work = measure.probe(model, batch, lambda b: model(**b).loss)["train_step"]
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        model(**batch).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return work / sorted(times)[len(times) // 2]


@cache
def around() -> tuple[float, float]:
    """Seconds that a command takes on this machine before its first run, and each of its runs beside its FLOPs.

    Those of a real command with three runs of five steps of a tiny model. Raises RuntimeError where it fails.
    """
    tiny = ["method=lora", "model=random_bert", "task=rte", "data=standin", "wandb=off", "train.steps=5"]
    limits = [f"task.limit.{split}=32" for split in ("train", "val", "test")]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench", "-m", *tiny, *limits, "seed=0,1,2", f"results={folder}"]
        begun = time.time()
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        ends = sorted(record.stat().st_mtime for record in Path(folder).glob("*/record.json"))
    if done.returncode:
        raise RuntimeError(f"the command that is timed has failed: {done.stdout}{done.stderr}")
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    return ends[0] - begun - each, each
