"""Greedy decoding: the same tokens as `generate`, for each method, whatever joins and leaves the batch."""

import pytest
import torch

from bench.random_models import random_model
from methods import METHODS
from tasks.decoding import Limits, generate, greedy
from tests.test_methods import applied, perturb

LIMITS = Limits(ends=list(range(0, 384, 20)), new_tokens=12, pad_token=0, stopped=lambda new: sum(new) % 6 == 0)
DECODERS = ("llama", "gpt2", "qwen2")


def prompts(rows: int, size: int) -> list[list[list[int]]]:
    """Prompts of 3 to 14 tokens, `size` at a time."""
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randint(3, 384, (3 + i * 5 % 12,), generator=draw).tolist() for i in range(rows)]
    return [whole[i : i + size] for i in range(0, rows, size)]


def cut(new: list[int]) -> list[int]:
    """`generate` goes on until the last row has ended by one of `ends`."""
    return next((new[:i] for i in range(1, len(new)) if LIMITS.end(new[:i])), new)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"hf", "compose"}))
def test_the_tokens_are_those_of_generate(name, kind):
    _, model = applied(name, kind)
    perturb(model.eval(), 0.02)
    with torch.inference_mode():
        assert greedy(model, prompts(10, 4), LIMITS) == [cut(n) for n in generate(model, prompts(10, 4), LIMITS)]


def test_no_row_is_decoded_that_has_ended(monkeypatch):
    model = random_model("llama")
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    with torch.inference_mode():
        found = greedy(model, prompts(40, 8), LIMITS)
    assert max(seen) == 8 and len({len(new) for new in found}) > 3  # rows end one by one
    assert sum(seen) == sum(map(len, found))  # one row of one forward for each token that is kept


def test_a_string_ends_a_row_and_what_is_read_is_read_late():
    model = random_model("llama")
    read = []

    def watched():
        for batch in prompts(12, 4):
            read.append(len(batch))
            yield batch

    limits = Limits(ends=[], new_tokens=6, pad_token=0, stopped=lambda new: len(new) == 3)
    with torch.inference_mode():
        found = greedy(model, watched(), limits)
    assert [len(new) for new in found] == [3] * 12 and read == [4, 4, 4]
    with torch.inference_mode():
        assert greedy(model, [], limits) == []


def test_caches_that_cannot_be_joined_are_emptied_first():
    """A sliding window keeps the last keys only: rows of another length do not fit beside them."""
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        assert greedy(model, prompts(10, 4), LIMITS) == [cut(n) for n in generate(model, prompts(10, 4), LIMITS)]


def test_a_token_is_written_behind_the_others_and_nothing_is_copied():
    from tasks.decoding import _start, _step

    model = random_model("llama")
    with torch.inference_mode():
        active = _start(model, dict(enumerate(prompts(4, 4)[0])), LIMITS)
        _step(model, active)
        layer = active.cache.layers[0]
        room, held = layer.keys.room, layer.keys.clone()
        _step(model, active)
        assert layer.keys.room is room and layer.keys.data_ptr() == room.data_ptr()
        assert torch.equal(layer.keys[..., :-1, :], held)
        whole = layer.keys.clone()
        active.keep([0, 2])
        assert torch.equal(layer.keys, whole[[0, 2]][..., -layer.keys.shape[-2] :, :])
        _step(model, active)
        assert layer.keys.room is not room and len(layer.keys) == len(layer.keys.room) == 2
