"""Image classification with a vision model (VTAB, CIFAR, digits)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.base import Row, register
from tasks.classification import Classification

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


@register
@dataclass
class Image(Classification):
    """The image processor of the checkpoint resizes (all of them to 224 pixels, ours to 32) and normalises, and its numbers
    are in the record; images are made RGB before. No augmentation: a row has the same pixels each time.
    """

    image: str = "image"
    labels: int = 10
    size: int = 32  # pixels a side in the public set; the stand-in's images have it too, up to 64
    grey: bool = False
    standin: str = "texture"

    kind: ClassVar[str] = "image"
    model_class: ClassVar[str] = "AutoModelForImageClassification"
    head: ClassVar[tuple[str, ...]] = ("classifier",)

    def columns(self) -> list[str]:
        return [self.image, self.label]

    def example(self, rng: Any) -> Row:
        from tasks import standin

        image, label = standin.texture(rng, self.labels, min(self.size, 64), grey=self.grey)
        return {self.image: image, self.label: label}

    def check(self, rows: Dataset, split: str) -> None:
        """Raise ValueError for rows without an image; broken ones are found while their pixels are hashed."""
        super().check(rows, split)
        images = rows.with_format("arrow")[self.image][:]
        if images.null_count:
            empty = [i for i, image in enumerate(images) if not image.is_valid]
            raise ValueError(f"{self.path}/{self.name}: {split} has {len(empty)} rows without an image: {empty[:5]}")

    def encode(self, row: Row, processor: Any) -> Row:
        """`pixel_values`: a float32 (3, height, width) array."""
        import numpy as np

        pixels = processor(row[self.image].convert("RGB"))["pixel_values"][0]
        return {"pixel_values": np.asarray(pixels, dtype=np.float32), "labels": int(row[self.label])}

    def collate(self, rows: list[Row], processor: Any) -> dict[str, Tensor]:
        """(batch, 3, height, width) float32 and int64 labels."""
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.stack([np.asarray(r["pixel_values"], dtype=np.float32) for r in rows]))
        return {"pixel_values": pixels, "labels": torch.tensor([r["labels"] for r in rows])}
