"""Forgetting: exactly zero for an untouched model, the entropy of a known one, the same for every batch size."""

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

import analysis
from analysis import forgetting
from analysis.forgetting import loss, of_run, probe, yardstick
from analysis.forgetting_text import texts
from bench.config import compose
from bench.prepare import find_device, prepare
from bench.random_models import random_model
from bench.record import Record
from bench.run import run
from methods.base import Unsupported
from tasks.data import DataConfig, MissingData

TINY = ["task=rte", "data=standin", "task.limit={train:16,val:8,test:8}", "task.max_length=32", "wandb=off"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz.,*`\"'()", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A folder with a random BERT that has its masked-language-model head."""
    folder = tmp_path_factory.mktemp("masked")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


def ready(*overrides):
    config = compose([*TINY, *overrides])
    return config, prepare(config, config.task.load(config.data, 0), find_device(config)).model


def model_override(kind, masked):
    return [f"model.path={masked}"] if kind == "masked" else [f"model=random_{kind}"]


@pytest.mark.parametrize("kind", ["masked", "gpt2", "llama"])
def test_an_untouched_model_forgets_exactly_nothing(kind, masked):
    config, model = ready("method=lora", *model_override(kind, masked))
    found = of_run(model, config)
    assert found["forgetting"] == 0 and found["before"] == found["after"] > 1
    assert found["kind"] == ("masked" if kind == "masked" else "causal") and "Python" in found["text"]
    with torch.no_grad():
        for p in model.base_model.parameters():
            p += 0.5 * torch.randn_like(p)
    other = of_run(model, config)
    assert (
        other["before"] == found["before"] and abs(other["forgetting"]) > 0.005
    )  # a random model has nothing to forget


def test_a_causal_loss_is_that_of_transformers():
    model = random_model("gpt2")
    ids = torch.randint(0, 384, (3, 20), generator=torch.Generator().manual_seed(0))
    own = loss(model, [(row, list(range(1, 20))) for row in ids], None)
    assert own == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


class Fixed(nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, p):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(p).log())

    def forward(self, input_ids):
        self.seen = input_ids
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


@pytest.mark.parametrize("mask", [None, 3])
def test_the_loss_of_a_known_distribution_is_its_entropy(mask):
    p = [0.5, 0.25, 0.25, 1e-9]
    ids = torch.tensor([3, 0, 0, 1, 2])
    entropy = -sum(q * math.log(q) for q in p[:3])
    model = Fixed(p)
    assert loss(model, [(ids, [1, 2, 3, 4])], mask) == pytest.approx(entropy, rel=1e-6)
    if mask is not None:  # one hidden token per row, each at its own place
        assert (model.seen == 3).sum(1).tolist() == [2, 2, 2, 2] and model.seen[:, 0].eq(3).all()


def test_the_value_does_not_depend_on_the_batch(masked):
    config, model = ready("method=lora", f"model.path={masked}")
    stick = yardstick(model, config)
    rows = [(torch.randint(5, 30, (9,)), list(range(1, 8))) for _ in range(3)]
    whole = BertForMaskedLM.from_pretrained(masked)
    assert loss(whole, rows, 4, batch=2) == pytest.approx(loss(whole, rows, 4, batch=64), rel=1e-5)
    assert stick.measure == "loss" and stick.lost(1.0, 1.5) == 0.5


def test_what_has_no_yardstick_says_why(masked, tmp_path):
    BertForMaskedLM.from_pretrained(masked).bert.save_pretrained(tmp_path)
    BertTokenizer.from_pretrained(masked).save_pretrained(tmp_path)
    config, model = ready("method=lora", f"model.path={tmp_path}")
    assert "brings no language-model head" in of_run(model, config)["reason"]
    config, model = ready("method=lora", "model=random_llama")
    assert "cannot be had here" in of_run(model, config, "wikitext")["reason"]
    with pytest.raises(ValueError, match="there are wikipedia"):
        of_run(model, config, "novels")
    config, model = ready("method=lora", "model=random_t5")
    with pytest.raises(Unsupported, match="encoder-decoder"):
        yardstick(model, config)


def test_a_probe_reads_what_features_hold():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = nn.functional.one_hot(y, 3).double() * 4 + 0.1 * torch.randn(60, 3, generator=g, dtype=torch.float64)
    assert probe(x[:30], y[:30], x[30:], y[30:]) == 1
    noise = torch.randn(600, 3, generator=g, dtype=torch.float64)
    labels = torch.arange(600) % 3
    assert probe(noise[:300], labels[:300], noise[300:], labels[300:]) == pytest.approx(1 / 3, abs=0.1)


def test_images_are_probed_on_another_set():
    config = compose(["task=digits", "data=standin", "task.limit={train:8,val:4,test:4}", "model=random_vit", "method=lora", "wandb=off"])  # fmt: skip
    model = prepare(config, config.task.load(config.data, 0), find_device(config)).model
    found = of_run(model, config)
    assert found["forgetting"] == 0 and found["measure"] == "accuracy" and found["standin"]
    assert found["text"] == "uoft-cs/cifar10 (stand-in)"


def test_in_a_run_and_afterwards_are_the_same(tmp_path):
    overrides = ["model=random_llama", "method=lora", "train.steps=2", "train.lr=0.1", f"results={tmp_path}"]
    record = run(compose([*TINY, *overrides, "forgetting=true"]))
    assert record.status == "ok", record.traceback
    assert abs(record.forgetting["forgetting"]) > 1e-6
    stored = Record.load(tmp_path / record.id)
    kept, stored.forgetting = stored.forgetting, {}
    stored.save(tmp_path)
    assert "forgetting" in forgetting.of_records(tmp_path)
    assert Record.load(tmp_path / record.id).forgetting == pytest.approx(kept)
    assert analysis.load(tmp_path)["forgetting_forgetting"].item() == pytest.approx(kept["forgetting"])


def test_texts_have_a_source():
    found, source = texts(DataConfig("standin"), 5)
    assert len(set(found)) == 5 and all(len(t.split()) >= 60 for t in found)
    assert source["licence"] == "PSF-2.0" and len(source["fingerprint"]) == 16
    with pytest.raises(ValueError, match="there are wikipedia"):
        texts(DataConfig("standin"), 5, "novels")
    with pytest.raises(MissingData):
        texts(DataConfig("real", root="."), 5, "wikitext")
