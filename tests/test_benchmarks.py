"""Benchmarks measure; what is exact about them is held here."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from bench import measure, offload
from bench.live import Live
from benchmarks import __main__ as guard
from benchmarks import memory, scaling, sides
from benchmarks.floor import counted

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [(">= 3", 3.0, True), (">= 3", 2.9, False), ("<= 1.05", 1.0, True), ("<= 1.05", 1.06, False)],
)
def test_goals(goal, value, met):
    assert guard.Goal("x", "", goal).met(value) is met


def test_every_benchmark_is_guarded_and_has_the_options_it_is_given():
    modules = {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - {"__main__"}
    runnable = {m for m in modules if "__main__" in (ROOT / "benchmarks" / f"{m}.py").read_text()}
    assert set(guard.BENCHMARKS) <= runnable
    for name, (options, goals) in guard.BENCHMARKS.items():
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        for flag in re.findall(r"--([a-z]+)", options):
            assert f'"--{flag}"' in source or f'("{flag}",' in source, f"{name} has no --{flag}"
        assert goals, name


def test_numbers_are_read_out_of_the_output(monkeypatch, capsys):
    said = (
        "lora               peft LORA        10.0   1.02   0.99    1.10      1.85    0.989     161.0    1.03    1.00\n"
    )
    monkeypatch.setattr(guard, "output", lambda command: said)
    values = {line.goal.what: line.value for line in guard.lines("methods")}
    assert values["lora: bytes kept for the backward, over the floor"] == 1.03
    assert values["lora: bytes kept, over peft's"] == 1.0
    assert values["lora: seconds of a step, over peft's"] == 1.02
    assert values["dora: bytes kept, over peft's"] is None


def test_an_unknown_benchmark_is_named():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "'speed'" in done.stderr and "startup" in done.stderr


@cache
def fitted(name):
    return memory.Fit(memory.ours(name), "cpu")


@pytest.mark.parametrize("name", ["lora", "lisa"])
def test_the_formulas_of_memory_predict_what_was_not_fitted(name):
    found = fitted(name)
    assert found.errors() == pytest.approx((0, 0), abs=1e-3)
    big, small = (found.largest(gib * 2**30, 512, True) for gib in (24, 8))
    assert big > 2 * small > 0
    assert found.largest(24 * 2**30, 512, False) < big < found.largest(24 * 2**30, 512, True, True)


@pytest.mark.parametrize("way", memory.WAYS.values(), ids=lambda way: f"checkpointing={way[0]} offload={way[1]}")
def test_the_peak_of_memory_is_what_lives_at_once(way, monkeypatch):
    """At a size where the loss decides, as it does for a large model with few tokens."""
    shape = memory.Shape(512, 3, 8192, 128)
    model, _ = memory.ours("lora")(memory.pretrained(shape, "cpu", checkpointing=way[0]))
    monkeypatch.setattr(offload, "SMALLEST", 1)
    batch = dict.fromkeys(("input_ids", "labels"), torch.zeros(1, 128, dtype=torch.long))
    live, where = Live(model), "activations" if way[1] else "none"
    cost = measure.probe(model, batch, lambda b: model(**b).loss, offload=where, live=live)
    assert live.peak == pytest.approx(fitted("lora").bytes(shape, *way), rel=0.02)
    assert ("offloaded" in cost) == way[1]


def qloras():
    return memory.ours("qlora"), memory.theirs("QLORA")


def test_pefts_qlora_needs_bitsandbytes_and_says_so(monkeypatch):
    monkeypatch.setattr(sides, "find_spec", lambda name: None)
    *_, line = memory.table(["peft QLORA"], [8.0], 512, "cpu")
    assert line.split(maxsplit=2)[2] == "not here: bitsandbytes is not installed"


def test_qlora_needs_no_more_than_pefts_with_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    shape = memory.Shape(512, 3, 512, 32)
    still = [memory.static(side, shape) for side in qloras()]
    assert still[1] - still[0] == 7 * 3 * 4 * (16 + 256)  # of each matrix the library keeps the code books
    assert len({memory.kept(side, shape, False, "cpu") for side in qloras()}) == 1


def test_lora_needs_no_more_than_pefts():
    pytest.importorskip("peft")
    shape = memory.Shape(512, 3, 512, 32)
    sides = memory.ours("lora"), memory.theirs("LORA")
    assert len({memory.static(side, shape) for side in sides}) == 1
    kept = [memory.kept(side, shape, False, "cpu") for side in sides]
    assert kept[0] <= kept[1]


def test_kept_bytes_grow_in_proportion_to_tokens_and_layers_and_hardly_with_the_rank():
    curves = {name: scaling.Curve(name) for name in ("tokens", "layers", "rank")}
    for n in (1, 2, 4):
        curves["tokens"].add(n, kept=counted(scaling.model(layers=1), scaling.batch(16 * n))["activations"])
        curves["layers"].add(n, kept=counted(scaling.model(layers=n), scaling.batch(16))["activations"])
        curves["rank"].add(n, kept=counted(scaling.model(layers=1, rank=n), scaling.batch(16))["activations"])
    found = {name: curve.exponent("kept") for name, curve in curves.items()}
    assert found["tokens"] == pytest.approx(1, abs=0.01) and found["layers"] == pytest.approx(1, abs=0.01)
    assert 0 < found["rank"] < 0.01


def test_a_power_law_is_found_and_drawn(tmp_path):
    curve = scaling.Curve("n")
    for n in (1, 2, 4, 8):
        curve.add(n, seconds=3.0 * n**1.5, kept=7.0)
    assert curve.exponent("seconds") == pytest.approx(1.5) and curve.exponent("kept", 2) == pytest.approx(0)
    scaling.draw([curve], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
