"""Data order: every row once per epoch, a function of seed and step alone, little padding."""

import itertools

import pytest
import torch

from bench.batches import TrainBatches, eval_batches, longest
from bench.encoded import Encoded


class Words:
    kind = "classification"

    def encode(self, row, processor):
        return {"input_ids": [1] * row["n"], "labels": row["n"]}

    def collate(self, rows, processor):
        return {"labels": torch.tensor([r["labels"] for r in rows])}


def encoded(n=103):
    return Encoded([{"n": 1 + i * 7 % 50, "row_id": i} for i in range(n)], Words(), None)


@pytest.mark.parametrize("buckets", [1, 3, 50])
def test_each_epoch_holds_every_row_once(buckets):
    batches = TrainBatches(encoded(), batch_size=10, seed=3, buckets=buckets)
    for epoch in range(3):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        assert sorted(i for s in steps for i in batches.indices(s)) == list(range(103))


def test_order_is_a_function_of_seed_and_step():
    def order(seed):
        batches = TrainBatches(encoded(), batch_size=10, seed=seed)
        return [batches.indices(s) for s in range(25)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:11] != order(0)[11:22]
    later = TrainBatches(encoded(), batch_size=10, seed=0)
    assert later.indices(17) == order(0)[17], "a resumed run sees the same batch without having seen the others"


def test_buckets_save_padding():
    def padding(buckets):
        batches = TrainBatches(encoded(400), batch_size=10, seed=0, buckets=buckets)
        lengths = [[batches.encoded.length(i) for i in batches.indices(s)] for s in range(batches.per_epoch)]
        return sum(max(b) * len(b) - sum(b) for b in lengths)

    assert padding(50) < padding(1) / 3


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_micro_batches_are_the_batch(accumulate):
    batches = TrainBatches(encoded(), batch_size=10, seed=0)
    for step in (0, 10):  # step 10 is the short last batch of an epoch
        parts = batches.micro(step, accumulate)
        assert torch.equal(torch.cat([p["labels"] for p in parts]), batches[step]["labels"])
        assert len(parts) <= accumulate


def test_endless():
    batches = TrainBatches(encoded(), batch_size=10, seed=0)
    assert len(list(itertools.islice(batches, 30))) == 30


def test_eval_batches_hold_every_row_once_longest_first():
    rows = [r for _, part in eval_batches(encoded(), 10) for r in part]
    assert sorted(r["row_id"] for r in rows) == list(range(103))
    assert rows[0]["n"] == 50
    assert set(longest(encoded(), 3)["labels"].tolist()) == {50, 49}


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        TrainBatches(encoded(0), batch_size=2, seed=0)
