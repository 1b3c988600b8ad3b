"""From a configuration and its rows to a model that is ready to train: the same for the same seed, whatever ran before."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bench import distributed, dropout, matmul
from bench.batches import TrainBatches, eval_batches
from bench.config import Config
from bench.encoded import Encoded, encode_splits
from bench.layout import recomputing
from bench.model import build
from bench.padding import choose_padding
from bench.prefix import Prefix, keep_evaluating
from bench.sharding import in_step, shard, shards
from bench.train import Stop, autocast, to_device
from bench.turns import member
from methods.base import Batch, Method, Unsupported

if TYPE_CHECKING:
    import pandas as pd

    from tasks import Rows, Task


@dataclass
class Prepared:
    """A model with its method applied, and the rows encoded for it."""

    model: nn.Module
    method: Method
    task: Task
    processor: Any
    encoded: dict[str, Encoded]
    head: set[int]  # ids of the head's parameters
    source: dict[str, Any]
    device: torch.device
    prefix: Prefix | None = None  # what is frozen below all that is trained; it stays in evaluation mode
    packed: bool = False  # whether the model computes no padding

    def train_batches(self, config: Config) -> TrainBatches:
        """The training batches of this seed."""
        cfg = config.train
        return TrainBatches(self.encoded["train"], batch_size=cfg.batch_size, seed=config.seed, buckets=cfg.buckets)

    def few(self) -> Batch:
        """Two training rows, or the only one."""
        return self.encoded["train"].batch(list(range(min(2, len(self.encoded["train"])))))

    def predict(self, split: str, config: Config, stop: Stop | None = None) -> pd.DataFrame:
        """Predictions for each row of `split`, in the order of row ids; several devices share the rows."""

        def batches() -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
            for batch, rows in eval_batches(self.encoded[split], config.train.eval_batch_size):
                if stop is not None:
                    stop.check()
                yield to_device(batch, self.device), rows

        training = self.model.training
        self.model.eval()
        table = None
        with (
            distributed.together(),
            torch.inference_mode(),
            autocast(config.train.precision, self.device),
            in_step(self.model),
        ):
            if distributed.share(range(len(self.encoded[split]))):
                table = self.task.task_of(split).predict(self.model, batches(), self.processor)
        self.model.train(training)
        return distributed.gathered(table).sort_values("row_id", ignore_index=True)


def prepare(config: Config, rows: Rows, device: torch.device) -> Prepared:
    """Build the pretrained model, apply the method: the same for the same seed, whatever ran before."""
    seed_everything(config.seed)
    built = build(config.model, config.task)
    home = torch.device("cpu") if shards(config) else device  # until each device has its part
    model = built.model.to(home)
    encoded = encode_splits(rows, config.task, built.processor)
    head = {id(p) for p in model.parameters() if p.requires_grad}
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})  # type: ignore[operator]
    ready = Prepared(model, config.method, config.task, built.processor, encoded, head, built.source, device)
    seed_everything(config.seed)
    batches = (to_device(batch, home) for batch in ready.train_batches(config))
    ready.model = config.method.apply(model, batches).to(home)
    if config.train.precision == "bf16_full":
        ready.model.to(torch.bfloat16)
    if not any(p.requires_grad for p in ready.model.parameters()) and not config.method.untrained:
        raise Unsupported(
            "nothing is trained: the method leaves every parameter frozen and the task brings no new head"
        )
    if not config.method.untrained:
        ready.prefix = keep_evaluating(ready.model, to_device(ready.few(), home))
        ready.source["evaluation_mode"] = list(ready.prefix.below) if ready.prefix else []
    if shards(config):
        shard(ready)
    choose_padding(ready, config)
    return ready


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def find_device(config: Config) -> torch.device:
    """The device of `config.device`, set up to compute the same numbers again. Raises ValueError if it is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={config.device}: no CUDA device is available here; use device=cpu or device=auto")
    if config.threads and member() is None:  # a team has its threads from `fused_launcher.py`
        torch.set_num_threads(config.threads)
    matmul.use(config.matmul)
    dropout.use()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it
    return torch.device(
        f"cuda:{torch.cuda.current_device()}" if name == "cuda" and distributed.launched() > 1 else name
    )
