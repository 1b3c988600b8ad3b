"""The root configuration: what `python -m bench key=value` can set. Importing this must not import torch's friends."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf, open_dict

from tasks.data import DataConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
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
    offload: str = "none"  # activations: what the backward pass needs waits in the host's memory: bench/offload.py
    eval_every: int | None = None  # steps; null: each epoch
    select: str = "best"  # best: the checkpoint with the best val score; last: the last one
    patience: int | None = None  # evaluations without a better val score before stopping; null: never
    buckets: int = 50  # batches that are sorted by length together; 1: none
    checkpoint_seconds: float | None = 120.0  # a killed run continues from here; null: no checkpoints
    padding: str = "auto"  # packed, padded; auto: packed where the model can and it pays: bench/padding.py
    deterministic: bool = True
    features: str = "off"  # auto: what frozen blocks make of a row is computed once and kept: bench/features.py

    def __post_init__(self) -> None:
        choose("train.schedule", self.schedule, SCHEDULES)
        choose("train.precision", self.precision, PRECISIONS)
        choose("train.select", self.select, ("best", "last"))
        choose("train.features", self.features, ("off", "auto"))
        choose("train.offload", self.offload, ("none", "activations"))
        choose("train.padding", self.padding, ("auto", "packed", "padded"))
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
    matmul: str = (
        "auto"  # who computes fp32 products on a CPU: torch (MKL), onednn, auto: the faster one (bench/matmul.py)
    )
    results: str = "results"
    save_state: bool = True  # keep the trained parameters beside the record
    spectra: bool = False  # after scoring: what happened to the singular vectors of every weight, spectra.parquet
    spectra_every: int | None = None  # steps: birth and rotation of singular vectors during training, dynamics.parquet
    forgetting: bool = False  # after scoring: what the model lost of its pretraining, before and after
    test: str = "open"  # open; locked: never read (trials of tuning); selected: only for what val has chosen on record
    force: bool = False  # run again what is done
    isolate: bool | str = "auto"  # a process for each run, whose peak of memory is its alone; auto: true on a GPU
    cells_per_gpu: int = 1  # isolated runs that share a GPU
    shard: bool = False  # under torchrun: weights shared out over its devices, for models too large for one of them
    lease: float = 120.0  # seconds without a sign of life after which another worker takes a run over
    name: str | None = None  # of the experiment: groups runs in tables and in W&B
    wandb: str = "auto"  # auto: online where a key exists, else offline; online, offline, off
    wandb_project: str = "paretune"
    choices: dict[str, str] = field(default_factory=dict)  # the names chosen for method, model and task

    def __post_init__(self) -> None:
        choose("wandb", self.wandb, ("auto", "online", "offline", "off"))
        choose("matmul", self.matmul, ("auto", "onednn", "torch"))
        choose("isolate", str(self.isolate).lower(), ("auto", "true", "false"))
        if self.cells_per_gpu < 1 or self.lease <= 0:
            raise ValueError(f"cells_per_gpu={self.cells_per_gpu} must be at least 1, lease={self.lease} positive")
        if self.spectra_every is not None and self.spectra_every < 1:
            raise ValueError(f"spectra_every={self.spectra_every} must be at least 1 step, or null for never")
        choose("test", self.test, ("open", "locked", "selected"))
        if self.shard and self.train.offload != "none":
            raise ValueError(
                f"shard=true with train.offload={self.train.offload} would copy gathered weights to the host: give one of them"
            )


def compose(overrides: list[str]) -> Config:
    """The configuration that `python -m bench OVERRIDES` would run, for notebooks and tests."""
    import hydra

    import methods  # noqa: F401  (registers the groups)

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    return to_config(cfg, choices)


def to_config(cfg: Any, choices: Any) -> Config:
    """Typed objects from a composed config; `choices` are the names that Hydra chose for each group.

    Refuses keys that got through a closed schema with `+` and that nothing would read.
    """
    config: Config = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    for name in ("method", "task", "model", "train"):
        part = getattr(config, name)
        if not dataclasses.is_dataclass(part):
            raise ValueError(f"{name} is not set; give {name}=NAME")
        known = {f.name for f in dataclasses.fields(part)}
        if unknown := [k for k in cfg[name] if k not in known]:
            raise ValueError(f"{name}.{unknown[0]} does not exist; the fields are {', '.join(sorted(known))}")
    config.choices = {k: choices[k] for k in ("method", "model", "task")}
    config.name = config.name or choices.get("experiment")
    return config


def from_record(values: dict[str, Any], classes: dict[str, str]) -> Config:
    """The configuration of a finished run, from its record's `config` alone."""
    import methods

    parts = {
        "method": methods.METHODS[classes["method"]](**values["method"]),
        "task": task_class(classes["task"])(**values["task"]),
        "model": ModelConfig(**values["model"]),
        "train": TrainConfig(**values["train"]),
        "data": DataConfig(**values["data"]),
    }
    return Config(**{k: v for k, v in values.items() if k != "classes"} | parts)


def task_class(kind: str) -> Any:
    """The dataclass of a kind of task. Raises hydra's ConfigLoadError where there is none of this name."""
    import tasks  # noqa: F401  (registers them)

    return OmegaConf.get_type(ConfigStore.instance().load(f"schema/task/{kind}.yaml").node)


def choose(key: str, value: str, options: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{key}={value!r}: the options are {', '.join(options)}")


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("token", lambda: secrets.token_hex(2), use_cache=True, replace=True)  # names a command
