"""Intruders with every change scaled to the same size."""

import pandas as pd
import pytest
import torch

from analysis.__main__ import main
from analysis.sizes import at_size, counts, sized
from analysis.spectra import measure
from bench.config import compose
from bench.run import run
from tests.test_spectra import DIAGONAL, FLAT, PLANTED, spiked


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("trained", [0.01, 4.0])
@pytest.mark.parametrize("strength", [s for s in PLANTED if s])
def test_a_spike_at_a_size_is_that_spike_however_far_it_was_trained(trained, strength):
    size = strength / float(DIAGONAL.norm())
    torch.testing.assert_close(at_size(DIAGONAL, spiked(trained), size), spiked(strength).float(), atol=1e-4, rtol=0)
    table = sized({"a": DIAGONAL}, {"a": spiked(trained)}, None, [size])
    assert counts(table)["intruders"].item() == PLANTED[strength][0][3]  # epsilon 0.5


def test_at_one_size_a_dense_change_makes_none_where_a_spike_does():
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = {"spike": DIAGONAL, "dense": DIAGONAL, "same": DIAGONAL}
    after = {"spike": DIAGONAL + 0.01 * torch.outer(FLAT, FLAT), "dense": DIAGONAL + 9 * noise, "same": DIAGONAL}
    table = sized(before, after, None, [0.2])
    assert [min(c) < 0.5 for c in table["cos_left"]] == [True, False] and list(table["name"]) == ["spike", "dense"]
    assert counts(table)["share"].item() == 0.5
    own = measure(DIAGONAL, at_size(DIAGONAL, after["dense"], 0.2))
    assert own["norm_ratio"] == pytest.approx(0.2) and table["cos_left"][1] == pytest.approx(own["cos_left"])


def test_no_change_stays_none_and_a_size_is_positive():
    torch.testing.assert_close(at_size(DIAGONAL, DIAGONAL, 0.1), DIAGONAL.float())
    with pytest.raises(ValueError, match=r"size=0: .* positive"):
        at_size(DIAGONAL, spiked(1), 0)


def test_of_runs(tmp_path, capsys):
    tiny = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:16,val:8,test:8}", "wandb=off"]
    fast = ["task.max_length=32", "train.steps=2", "train.lr=0.1", f"results={tmp_path}"]
    for method in (["method=lora", "method.rank=1"], ["method=bitfit"]):
        assert run(compose([*tiny, *fast, *method])).status == "ok"
    assert not main(["sizes", str(tmp_path), "--sizes", "0.001,9"])
    lora, bitfit = sorted(capsys.readouterr().out.strip().splitlines(), key=lambda line: "bitfit" in line)
    assert "seed 0: 0 at size 0.001, " in lora and "no weight change" in bitfit
    (path,) = tmp_path.glob("*/sizes.parquet")
    assert list(counts(pd.read_parquet(path))["share"]) == [0, 1]
    assert main(["sizes", str(tmp_path), "--sizes", "small"]) and "comma-separated" in capsys.readouterr().err
