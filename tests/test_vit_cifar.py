"""The shipped ViT: small, finite, as its card says, and better than no pretraining on another task."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from bench.vit_cifar import data, pretrain, probe, store

FILE = store.HERE / "model.safetensors"


def test_files_are_small_finite_half_precision():
    assert FILE.stat().st_size <= 8_000_000
    weights = load_file(FILE) | load_file(store.HERE / store.HEAD)
    assert all(w.dtype == torch.float16 and torch.isfinite(w).all() for w in weights.values())


def test_card_names_the_sha256_of_the_weights():
    card = (store.HERE / "README.md").read_text()
    assert {hashlib.sha256((store.HERE / f).read_bytes()).hexdigest() for f in (FILE.name, store.HEAD)} <= set(
        re.findall(r"\b[0-9a-f]{64}\b", card)
    )


def test_loads_with_a_fresh_head_of_any_size():
    from transformers import ViTForImageClassification

    model, info = ViTForImageClassification.from_pretrained(store.HERE, num_labels=7, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert 2_000_000 <= sum(p.numel() for p in model.parameters()) <= 6_000_000
    assert model(torch.zeros(1, 3, 32, 32, dtype=model.dtype)).logits.shape == (1, 7)


def test_processor_file_says_what_the_pretraining_did():
    saved = json.loads((store.HERE / "preprocessor_config.json").read_text())
    assert (tuple(saved["image_mean"]), tuple(saved["image_std"])) == (data.MEAN, data.STD)


def test_linear_probe_on_digits_beats_random_initialisation():
    pretrained, random = probe.compare(*probe.cut(probe.digits(), (200, 200)))
    assert pretrained > random + 0.05


def test_training_forward_equals_the_models_own():
    model, pixels = store.load(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        own = model(pixels).logits
        assert torch.allclose(pretrain.logits(model, pixels, torch.arange(64).expand(2, -1)), own, atol=1e-4)


def test_augmentation_keeps_shape_and_depends_on_the_generator_alone():
    images = torch.arange(2 * 3 * 32 * 32.0).view(2, 3, 32, 32)
    first, again = (pretrain.augment(images, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == images.shape and torch.equal(first, again)
    assert torch.equal(pretrain.augment(images, 0, torch.Generator().manual_seed(0)).sort(3)[0], images)


def run(out, steps):
    recipe = pretrain.Recipe(steps=steps, cooldown=2, batch=8, warmup=2, held_out=8)
    pretrain.pretrain(out, out, recipe, compile=False)
    return load_file(out / store.CHECKPOINT)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    rows = data.Images(torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8), torch.arange(24) % 10)
    monkeypatch.setattr(data, "cifar10", lambda root, split: rows)
    monkeypatch.setattr(store, "SHAPE", store.SHAPE | {"hidden_size": 24, "num_hidden_layers": 1})
    whole, epoch_of = run(tmp_path / "whole", 6), pretrain.train_epoch

    def interrupted(*args, **kwargs):
        if args[3] == 2:
            raise KeyboardInterrupt
        return epoch_of(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "train_epoch", interrupted)
        run(tmp_path / "parts", 9)
    parts = run(tmp_path / "parts", 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_checkpoint_past_the_plateau_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    store.checkpoint(tmp_path, model, [], 5, recipe=pretrain.Recipe(steps=6, cooldown=2))
    with pytest.raises(ValueError, match="--steps 6"):
        store.resume(tmp_path, model, [], recipe=pretrain.Recipe(steps=8, cooldown=2))
    assert store.resume(tmp_path, model, [], recipe=pretrain.Recipe(steps=6, cooldown=2)) == 5


def test_missing_data_names_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="tasks fetch cifar10"):
        data.cifar10(tmp_path, "train")
