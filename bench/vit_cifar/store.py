"""Files of the pretrained ViT: the backbone, its CIFAR-10 head, and the checkpoint of a run under way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bench.vit_cifar.pretrain import Recipe

Vit = Any  # transformers.ViTForImageClassification, whose layers mypy takes for tensors
HERE = Path(__file__).parent
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
HEAD, CHECKPOINT = "head_cifar10.safetensors", "checkpoint.safetensors"


def fresh() -> Vit:
    """The architecture with ten classes at random initialisation."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**(SHAPE | {"num_labels": len(CLASSES)})))


def load(folder: Path = HERE, head: bool = True) -> Vit:
    """The stored model in fp32 and eval mode; with `head`, its CIFAR-10 classifier instead of a fresh one."""
    from safetensors.torch import load_file
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder, num_labels=len(CLASSES), dtype=torch.float32)
    if head:
        model.classifier.load_state_dict({name: value.float() for name, value in load_file(folder / HEAD).items()})
    return model.eval()


def save(folder: Path, model: Vit) -> None:
    """Write backbone and head as fp16, the configuration without a head's size, and the processor's file."""
    from safetensors.torch import save_file
    from transformers import ViTImageProcessor, ViTModel

    from bench.vit_cifar.data import MEAN, STD

    backbone = ViTModel(type(model.config)(**SHAPE), add_pooling_layer=False)
    backbone.load_state_dict(model.vit.state_dict())
    backbone.half().save_pretrained(folder)
    head = {name: value.detach().half().contiguous() for name, value in model.classifier.state_dict().items()}
    save_file(head, folder / HEAD, {"format": "pt"})
    size = {"height": SHAPE["image_size"], "width": SHAPE["image_size"]}
    ViTImageProcessor(size=size, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)


def _state(model: nn.Module, steppers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, stepper in enumerate(steppers):
        for index, values in stepper.state_dict()["state"].items():
            state |= {f"{number}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    return state


def checkpoint(folder: Path, model: nn.Module, steppers: Sequence[Any], done: int, *, recipe: Recipe) -> None:
    """Write weights and optimizer states after `done` steps, atomically."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{CHECKPOINT}.part"
    meta = {"done": str(done), "steps": str(recipe.steps), "plateau": str(recipe.steps - recipe.cooldown)}
    save_file(_state(model, steppers), part, meta)
    os.replace(part, folder / CHECKPOINT)


def resume(folder: Path, model: nn.Module, steppers: Sequence[Any], *, recipe: Recipe) -> int:
    """Load the checkpoint of `folder` if there is one; return the steps done, 0 without it.

    Raises ValueError where the checkpoint lies in the cooldown of a run with another number of steps, or beyond the
    plateau of this one: the result would equal no uninterrupted run.
    """
    from safetensors import safe_open

    if not (folder / CHECKPOINT).exists():
        return 0
    with safe_open(folder / CHECKPOINT, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = {key: int(value) for key, value in file.metadata().items()}
    done, plateau = meta["done"], min(meta["plateau"], recipe.steps - recipe.cooldown)
    if meta["steps"] != recipe.steps and done > plateau:
        raise ValueError(
            f"{folder} holds step {done} of {meta['steps']}: past the plateau; use --steps {meta['steps']}."
        )
    model.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
    for number, stepper in enumerate(steppers):
        _restore(stepper, {name: value for name, value in state.items() if name.startswith(f"{number}.")})
    return done


def _restore(stepper: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    whole = stepper.state_dict()
    for name, value in state.items():
        _, index, key = name.split(".")
        whole["state"].setdefault(int(index), {})[key] = value
    stepper.load_state_dict(whole)
