"""CIFAR-10 as tensors, read from the project's mirror folder in the hub's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.registry import cache

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """Pixels (N, 3, 32, 32) as uint8 and labels (N,) as int64."""

    pixels: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Images:
        """The rows numbered in `index`."""
        return Images(self.pixels[index], self.labels[index])


def normalise(pixels: Tensor) -> Tensor:
    """Float pixels 0..255 (B, 3, H, W) as the model takes them; the processor's file says the same."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels / 255 - mean) / std


def mirror() -> Path:
    """The mirror folder of the user's cache."""
    return cache() / "mirror"


def read(root: Path, hub_id: str, split: str, column: str) -> Images:
    """All rows of `split` of a mirrored data set of images of one size, in the stored order; grey becomes RGB."""
    import numpy as np
    from datasets import load_dataset

    rows = load_dataset(str(root / hub_id), split=split)
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in rows[column]]))
    return Images(pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"]))


def cifar10(root: Path, split: str) -> Images:
    """CIFAR-10's `split`, "train" or "test", below `root`; FileNotFoundError where absent."""
    folder = root / "uoft-cs/cifar10"
    if not folder.is_dir():
        raise FileNotFoundError(f"CIFAR-10 is not in {folder}. Run `python -m tasks fetch cifar10`, or pass --root.")
    return read(root, "uoft-cs/cifar10", split, "img")
