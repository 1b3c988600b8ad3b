"""The image trunk of SAM 2 Tiny out of a package that carries it as an ONNX Runtime file (a FlatBuffer)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.registry import Package, read

ENCODER = "package/dist/sam2_hiera_tiny_encoder.with_runtime_opt.ort"
NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.layers.0": "mlp.proj_in",
    "mlp.layers.1": "mlp.proj_out",
    "patch_embed.proj": "patch_embed.projection",
}
FLOAT = 1  # of TensorDataType
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as SAM 2 was trained with


def sam2_hiera_tiny(raw: Path, package: Package) -> tuple[Any, Any]:
    """The trunk and an image processor for 224 x 224, where its windows (8, 4, 14, 7) fit without padding."""
    from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig
    from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model = Sam2HieraDetModel(Sam2HieraDetConfig())
    model.load_state_dict(_state(_initialisers(read(package, ENCODER))))
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224}, image_mean=MEAN, image_std=STD, resample=3)
    return model.eval(), processor


def _state(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Names of transformers: parameters keep a path with dots; folded, transposed linear weights one with slashes."""
    state = {}
    for name, values in tensors.items():
        tensor = torch.from_numpy(values.copy())
        if name.startswith("model.image_encoder.trunk."):
            state[_rename(name.removeprefix("model.image_encoder.trunk."))] = tensor
        elif found := re.fullmatch(r"/image_encoder/trunk/(blocks\.\d+/.*)/Transpose_output_0", name):
            state[_rename(found[1].replace("/", ".")) + ".weight"] = tensor.T.contiguous()
    background, window = _positions(torch.from_numpy(tensors["/image_encoder/trunk/Transpose_output_0"].copy())[0])
    return state | {"pos_embed": background, "pos_embed_window": window}


def _rename(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def _positions(folded: Tensor) -> tuple[Tensor, Tensor]:
    """The two position embeddings, (1, C, 7, 7) and (1, C, 8, 8), from their sum over the (C, 256, 256) grid.

    The file holds bicubic(first) + tiled(second), linear in both: least squares gives them back. A constant may move
    between the two; the smallest solution is taken, and their sum is unchanged at the file's resolution.
    """
    channels, size = folded.shape[0], folded.shape[-1]
    values = folded.reshape(channels, -1).T.double()
    points = torch.eye(49, dtype=torch.float64).view(49, 1, 7, 7)
    stretched = torch.nn.functional.interpolate(points, size=(size, size), mode="bicubic").view(49, -1).T
    tiles = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8).tile(1, 1, size // 8, size // 8).view(64, -1).T
    design = torch.cat([stretched, tiles], dim=1)
    solution = torch.linalg.pinv(design.T @ design, rtol=1e-12, hermitian=True) @ (design.T @ values)
    error = float((design @ solution - values).abs().max())
    if error > 1e-5:
        raise ValueError(f"the position embeddings do not explain the folded ones: off by {error:.1e}")
    background, window = solution[:49].T, solution[49:].T
    return background.reshape(1, channels, 7, 7).float(), window.reshape(1, channels, 8, 8).float()


class _Table:
    """A FlatBuffer table at position `at`: a signed offset back to a list that says where each field lies."""

    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at
        self.slots = at - self.number(at, "<i4")

    def number(self, at: int, kind: str = "<u4") -> int:
        return int(np.frombuffer(self.data, kind, 1, at)[0])

    def field(self, index: int) -> int:
        """Position of field `index`, 0 where it is absent."""
        slot = 4 + 2 * index
        offset = self.number(self.slots + slot, "<u2") if slot < self.number(self.slots, "<u2") else 0
        return self.at + offset if offset else 0

    def follow(self, at: int) -> int:
        return at + self.number(at)

    def table(self, index: int) -> _Table:
        return _Table(self.data, self.follow(self.field(index)))

    def vector(self, index: int, kind: str) -> np.ndarray:
        """Copyless view of the vector (or string) in field `index`."""
        at = self.follow(self.field(index))
        return np.frombuffer(self.data, kind, self.number(at), at + 4)

    def tables(self, index: int) -> list[_Table]:
        at = self.follow(self.field(index))
        return [_Table(self.data, self.follow(at + 4 + 4 * i)) for i in range(self.number(at))]


def _initialisers(data: bytes) -> dict[str, np.ndarray]:
    """fp32 constants by name. Field numbers are those of ONNX Runtime's schema `ort.fbs`.

    InferenceSession: model 1. Model: graph 7. Graph: initializers 0. Tensor: name 0, dims 2, data type 3, raw data 4.
    """
    root = _Table(data, int(np.frombuffer(data, "<u4", 1)[0]))
    found = {}
    for tensor in root.table(1).table(7).tables(0):
        kind = tensor.field(3)
        if kind and tensor.number(kind, "<i4") == FLOAT and tensor.field(4):
            shape = tensor.vector(2, "<i8") if tensor.field(2) else ()
            values = tensor.vector(4, "u1").tobytes()
            found[tensor.vector(0, "u1").tobytes().decode()] = np.frombuffer(values, "<f4").reshape(shape)
    return found
