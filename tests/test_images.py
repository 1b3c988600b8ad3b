"""VTAB-1k and FGVC: their members and cuts, what a model sees of an image, and images that are broken."""

import hashlib
import io
import json

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from transformers import ViTImageProcessorPil

import tasks
from tasks import DataConfig, compose_task
from tasks.splits import cut

VTAB, FGVC = tasks.suite("vtab"), tasks.suite("fgvc")
PUBLISHED = {  # classes and test rows: arXiv 1910.04867, table 2, at the versions that its code reads
    "caltech101": (102, 6085), "cifar100": (100, 10000), "dtd": (47, 1880), "flowers102": (102, 6149), "pets": (37, 3669),
    "svhn": (10, 26032), "sun397": (397, 21750), "patch_camelyon": (2, 32768), "eurosat": (10, 5400),
    "resisc45": (45, 6300), "diabetic_retinopathy": (5, 42670), "clevr_count": (8, 15000), "clevr_distance": (6, 15000),
    "dmlab": (6, 22735), "kitti_distance": (4, 711), "dsprites_location": (16, 73728),
    "dsprites_orientation": (16, 73728), "smallnorb_azimuth": (18, 12150), "smallnorb_elevation": (9, 12150),
}  # fmt: skip
VPT = {  # train, val, test and classes: arXiv 2203.12119, table 8
    "fgvc_cub": (5394, 600, 5794, 200),
    "fgvc_flowers102": (1020, 1020, 6149, 102),
    "fgvc_stanford_dogs": (10800, 1200, 8580, 120),
    "fgvc_stanford_cars": (7329, 815, 8041, 196),
}


def cuts(name):
    task = compose_task(name)
    return cut(task.protocol, task.splits, task.sizes, task.holdout)[0]


def test_vtab_has_its_19_tasks_in_three_groups():
    assert {name.removeprefix("vtab_") for name in VTAB} == set(PUBLISHED)
    groups = list(VTAB.values())
    assert [groups.count(g) for g in ("natural", "specialised", "structured")] == [7, 4, 8]


@pytest.mark.parametrize("name", VTAB)
def test_vtab_is_cut_into_800_200_and_the_public_test_split(name):
    task = compose_task(name)
    classes, test = PUBLISHED[name.removeprefix("vtab_")]
    assert (task.labels, task.expected()) == (classes, {"train": 800, "val": 200, "test": test})
    found, sentence = cut(task.protocol, task.splits, task.sizes, task.holdout)
    assert "not the published lists" in sentence
    assert not set(found["train"]) & set(found["val"]) and task.splits["test"] != task.splits["train"]


@pytest.mark.parametrize("name", FGVC)
def test_fgvc_is_cut_as_in_vpt(name):
    task = compose_task(name)
    assert (*task.expected().values(), task.labels) == VPT[name]
    assert not set(cuts(name)["train"]) & set(cuts(name)["val"]) or task.splits["train"] != task.splits["val"]


def test_the_cuts_are_pinned():
    """The same in every process, on every platform. Changing them changes all numbers ever recorded: raise `version` then."""
    found = [cuts(name) for name in ("vtab_flowers102", "vtab_pets", "fgvc_cub")]
    assert [found[0]["val"][0], found[1]["val"][0], found[2]["val"][:4]] == [820, 2649, [15, 36, 44, 46]]
    digest = hashlib.sha256(json.dumps([[c["train"], c["val"]] for c in found]).encode()).hexdigest()
    assert digest[:16] == "2c48f1507d1c5890"


def test_224_pixels_with_the_checkpoints_own_normalisation_and_nothing_random():
    task, half = compose_task("vtab_dtd"), [0.5, 0.25, 0.5]
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224}, image_mean=half, image_std=half, resample=2)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8))
    first, again = (task.encode({"webp": photo, "cls": 3}, processor)["pixel_values"] for _ in range(2))
    resized = np.asarray(photo.resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    assert first.shape == (3, 224, 224) and np.array_equal(first, again)
    assert np.allclose(first, ((resized - half) / half).transpose(2, 0, 1), atol=1e-5)


def test_how_pixels_are_made_is_recorded():
    from bench.config import ModelConfig
    from bench.model import build

    said = build(ModelConfig(path="packaged:vit_cifar", kind="vision"), compose_task("vtab_dtd")).source["processor"]
    assert {"size", "image_mean", "image_std", "resample", "do_normalize"} <= set(said)


def test_dsprites_labels_are_16_bins_of_32_places_and_40_angles(monkeypatch):
    """Out of a package with 1,280 images, whose first pixel says which they are."""
    import zipfile

    from tasks import package_images

    classes = np.array([(0, 0, 0, angle, x, 0) for angle in range(40) for x in range(32)])
    images = np.zeros((len(classes), 64, 64), np.uint8)
    images[:, 0, :11] = (np.arange(len(classes))[:, None] >> np.arange(11)) & 1
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for name, array in (("latents_classes.npy", classes), ("imgs.npy", images)):
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(name, content.getvalue())
    monkeypatch.setattr(package_images, "read", lambda package, member: inner.getvalue())
    monkeypatch.setattr(package_images, "_DSPRITES_DRAW", {"train": 1000, "test": 280})
    for source, column, values in (("orientation", 3, 40), ("location", 4, 32)):
        splits = package_images.IMAGES[f"vtab_dsprites_{source}"].read()
        pixels = [np.asarray(Image.open(io.BytesIO(r["image"]["bytes"]))) for s in splits.values() for r in s]
        which = [int((p[0, :11] // 255 * 2 ** np.arange(11)).sum()) for p in pixels]
        assert sorted(which) == list(range(1280)) and {p.max() for p in pixels[1:]} <= {0, 255}
        labels = [r["label"] for s in splits.values() for r in s]
        assert labels == [int(classes[i, column] / (values / 16)) for i in which] and set(labels) == set(range(16))


def png():
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("content", [b"no image", png()[:60], None])
def test_broken_images_are_named_with_row_and_split(tmp_path, monkeypatch, content):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "uoft-cs" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    typed = Features({"img": ImageColumn(), "label": Value("int64")})
    for split in ("train", "test"):
        images = [{"bytes": png(), "path": None} for _ in range(12)]
        if split == "test":
            images[7] = {"bytes": content, "path": None} if content else None
        Dataset.from_dict({"img": images, "label": [0] * 12}, features=typed).to_parquet(folder / f"{split}-0.parquet")
    files = [{"split": split, "path": f"plain_text/{split}-*"} for split in ("train", "test")]
    card = json.dumps({"configs": [{"config_name": "plain_text", "data_files": files}]})
    (folder.parent / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match=r"cifar10.*: test .*\b7\b"):
        compose_task("cifar10", ["task.holdout=2"]).load(DataConfig("real", str(tmp_path)))
