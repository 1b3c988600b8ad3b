"""Dropout on a CPU: masks of the right share, the same from a seed, and attention's softmax to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import dropout


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dropout, "intel", lambda: False)
    dropout.use(False)
    dropout.use()
    yield
    dropout.use(False)


def mask(seed: int, p: float = 0.9, *shape: int, **options: object) -> Tensor:
    torch.manual_seed(seed)
    return torch.empty(*shape or (1001,), **options).bernoulli_(p)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("p", [0.9, 0.5, 0.1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_share_of_ones(p: float, dtype: torch.dtype) -> None:
    n = 2**20
    found = mask(0, p, n, dtype=dtype).float()
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert abs(float(found.mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)
    pairs = float((found[1:] * found[:-1]).mean())  # neighbours are independent
    assert abs(pairs - p * p) < 8 * math.sqrt(p * p * (1 - p * p) / n)


def sfc64(words: list[int], count: int) -> list[int]:
    """Outputs of the generator by its definition (Doty-Humphrey's PractRand), seeded as numpy does: 12 are thrown away."""
    a, b, c, counter, found, low = *words, 1, [], 2**64 - 1
    for _ in range(12 + count):
        found.append((a + b + counter) & low)
        counter += 1
        a, b, c = b ^ (b >> 11), (c + (c << 3)) & low, (((c << 24) | (c >> 40)) + found[-1]) & low
    return found[12:]


def test_the_numbers_are_those_of_sfc64() -> None:
    """32 bits each, compared with p as signed numbers."""
    torch.manual_seed(3)
    words = torch.empty(3, dtype=torch.int64).random_(-(2**63), None).numpy().view(np.uint64).tolist()
    bits = np.array(sfc64(words, 501), dtype=np.uint64).view(np.int32)[:1001]
    assert mask(3).tolist() == (bits / 2**32 + 0.5 < 0.9).tolist()


def test_one_seed_one_mask() -> None:
    assert torch.equal(mask(1), mask(1)) and not torch.equal(mask(1), mask(2))
    first = mask(1)
    assert not torch.equal(first, torch.empty(1001).bernoulli_(0.9))  # the next one
    assert torch.equal(mask(1, 0.9, 77, 13), first.view(77, 13))
    assert torch.equal(
        torch.empty(13, 77).t().bernoulli_(0.9, generator=torch.Generator().manual_seed(1)), mask(1, 0.9, 77, 13)
    )


def test_a_given_generator_is_the_one_that_moves() -> None:
    torch.manual_seed(0)
    before, own = torch.get_rng_state(), torch.Generator().manual_seed(1)
    masks = [torch.empty(1001).bernoulli_(0.9, generator=own) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], mask(1)) and not torch.equal(*masks)


def test_the_ends_and_nothing() -> None:
    assert mask(0, 1.0).all() and not mask(0, 0.0).any() and mask(0, 0.5, 0, 3).shape == (0, 3)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"between 0 and 1, not {p}"):
            mask(0, p)


def test_dropout_and_its_gradient() -> None:
    x = torch.ones(64, 64, requires_grad=True)
    y = F.dropout(x, 0.25)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, grad) and set(y.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert torch.equal(F.dropout(x, 0.25, training=False), x)


def by_torch(compute: object) -> object:
    dropout.use(False)
    found = compute()  # type: ignore[operator]
    dropout.use()
    return found


def test_torchs_masks_come_back() -> None:
    theirs = by_torch(lambda: mask(0))
    assert not torch.equal(theirs, mask(0))  # type: ignore[arg-type]
    dropout.use(False)
    assert torch.equal(theirs, mask(0))  # type: ignore[arg-type]


def test_mkl_draws_on_intels_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = by_torch(lambda: mask(0))
    monkeypatch.setattr(dropout, "intel", lambda: True)
    dropout.use(False)
    dropout.use()
    assert torch.equal(theirs, mask(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["plain", "an empty row", "not a number", "nothing"])
@pytest.mark.parametrize("dim", [-1, 1])
def test_the_softmax_is_torchs_to_the_bit(what: str, dim: int) -> None:
    x = torch.randn(2, 3, 5, 0 if what == "nothing" else 7)
    if what == "an empty row":
        x[:, :, :2] = x[1, ..., 3] = -math.inf
    elif what == "not a number":
        x[0, 0, 0, 0] = math.nan
        x[1, :, 0] = -math.inf

    def both() -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        y = torch._safe_softmax(inputs, dim)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for found, expected in zip(both(), by_torch(both), strict=True):  # type: ignore[call-overload]
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_attention_with_dropout_is_the_formula() -> None:
    q, k, v, see = (*torch.randn(3, 2, 3, 5, 8), torch.ones(2, 1, 5, 5).tril().bool())
    see[0, 0, 2] = False  # a row with no key
    torch.manual_seed(0)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=see, dropout_p=0.5)
    torch.manual_seed(0)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~see, -math.inf).softmax(-1).nan_to_num(0)
    torch.testing.assert_close(found, F.dropout(scores, 0.5) @ v)
    assert not found[0, :, 2].any()
