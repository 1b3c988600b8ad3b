"""The root configuration: what `python -m bench key=value` can set. Importing this must not import torch's friends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from tasks.data import DataConfig

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16", "bf16_full")


@dataclass
class ModelConfig:
    """One checkpoint; see `conf/model/`."""

    path: str = MISSING  # hub id, folder, embedded:NAME, packaged:NAME or random:KIND
    revision: str = "main"
    dtype: str = "float32"  # of the frozen weights
    kind: str = "encoder"  # encoder, decoder, seq2seq or vision: for people; the code asks the checkpoint
    exact: bool = True  # False: de-quantised weights, of which no spectral claim can be made
    max_length: int | None = None  # truncation, tokens
    attention: str = "sdpa"  # the same implementation for every method of a comparison


@dataclass
class TrainConfig:
    """The training loop, the same for every method."""

    lr: float | None = None  # null: the learning rate of the method's own paper
    epochs: float | None = 3.0
    steps: int | None = None  # optimizer steps; wins over epochs where given
    batch_size: int = 32
    accumulate: int = 1  # micro-batches of batch_size / accumulate rows per optimizer step
    eval_batch_size: int = 64
    schedule: str = "linear"  # linear, cosine, constant
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.0
    clip: float | None = 1.0  # norm of all gradients
    precision: str = "fp32"  # fp32; bf16, fp16: autocast; bf16_full: trained parameters in bf16 too
    gradient_checkpointing: bool = False
    eval_every: int | None = None  # steps; null: each epoch
    select: str = "best"  # best: the checkpoint with the best val score; last: the last one
    patience: int | None = None  # evaluations without a better val score before stopping; null: never
    buckets: int = 50  # batches that are sorted by length together; 1: none
    checkpoint_seconds: float | None = 120.0  # a killed run continues from here; null: no checkpoints
    deterministic: bool = True

    def __post_init__(self) -> None:
        choose("train.schedule", self.schedule, SCHEDULES)
        choose("train.precision", self.precision, PRECISIONS)
        choose("train.select", self.select, ("best", "last"))
        if self.steps is None and self.epochs is None:
            raise ValueError("train.steps and train.epochs are both null: give one of them")
        for name in ("batch_size", "accumulate", "eval_batch_size", "buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"train.batch_size={self.batch_size} is no multiple of train.accumulate={self.accumulate}")


@dataclass
class Config:
    """Everything that one run is made of."""

    method: Any = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    task: Any = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: int | None = None  # of torch on a CPU; null: torch's own choice
    results: str = "results"
    save_state: bool = True  # keep the trained parameters beside the record
    force: bool = False  # run again what is done
    name: str | None = None  # of the experiment: groups runs in tables and in W&B
    wandb: str = "auto"  # auto: online where a key exists, else offline; online, offline, off
    wandb_project: str = "paretune"
    choices: dict[str, str] = field(default_factory=dict)  # the names chosen for method, model and task

    def __post_init__(self) -> None:
        choose("wandb", self.wandb, ("auto", "online", "offline", "off"))


def choose(key: str, value: str, options: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{key}={value!r}: the options are {', '.join(options)}")


def to_config(cfg: Any) -> Config:
    """Typed objects from a composed config. Refuses keys that got through with `+` but that no field reads."""
    import dataclasses

    from omegaconf import OmegaConf

    config: Config = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    parts = {"method": config.method, "task": config.task, "model": config.model, "train": config.train}
    for name, part in parts.items():
        if not dataclasses.is_dataclass(part):
            raise ValueError(f"{name} is not set; give {name}=NAME")
        known = {f.name for f in dataclasses.fields(part)}
        unknown = [k for k in cfg[name] if k not in known]
        if unknown:
            raise ValueError(f"{name}.{unknown[0]} does not exist; the fields are {', '.join(sorted(known))}")
    return config


ConfigStore.instance().store(name="schema", node=Config)
