"""Averages over a suite: the published ones from the published scores, and none of an incomplete suite."""

import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.fronts import Mixed
from analysis.suites import suite_average, text
from tasks import suite
from tests.test_analysis import synthetic

ORDER = (
    "cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn", "sun397", "patch_camelyon", "eurosat", "resisc45",
    "diabetic_retinopathy", "clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_location",
    "dsprites_orientation", "smallnorb_azimuth", "smallnorb_elevation",
)  # fmt: skip
LORA = (
    67.1,
    91.4,
    69.4,
    98.8,
    90.4,
    85.3,
    54.0,
    84.9,
    95.3,
    84.4,
    73.6,
    82.9,
    69.2,
    49.8,
    78.5,
    75.7,
    47.1,
    31.0,
    44.0,
)
NOAH = (
    69.6,
    92.7,
    70.2,
    99.1,
    90.4,
    86.1,
    53.7,
    84.4,
    95.4,
    83.9,
    75.8,
    82.8,
    68.9,
    49.9,
    81.7,
    81.8,
    48.3,
    32.8,
    44.2,
)


def table(method="lora", scores=LORA):
    """ViT-B/16 (ImageNet-21k), top-1 per cent, as V-PETL Bench prints them."""
    tasks = [f"vtab_{name}" for name in ORDER]
    return pd.DataFrame(
        {"task": tasks, "model": "vit_b16", "method": method, "score": scores, "n": 1, "data_standin": False}
    )


def test_both_published_averages_come_out():
    found = suite_average(pd.concat([table(), table("noah", NOAH)]), "vtab")
    assert list(found["method"]) == ["noah", "lora"]
    assert found["mean"].round(2).tolist() == [73.25, 72.25]
    assert found["group_mean"].round(2).tolist() == [75.48, 74.60]
    assert found.loc[1, "natural"] == pytest.approx(sum(LORA[:7]) / 7)


def test_an_incomplete_suite_is_refused_by_name():
    part = table().query("task not in ('vtab_dtd', 'vtab_svhn')")
    with pytest.raises(ValueError, match="lora on vit_b16 has 17 of 19, without vtab_dtd, vtab_svhn"):
        suite_average(part)
    both = pd.concat([part, table("noah", NOAH)])
    assert list(suite_average(both)["method"]) == ["noah"]
    assert "not averaged: lora on vit_b16 has 17 of 19, without vtab_dtd, vtab_svhn" in text(both, "vtab")
    without_score = table().assign(score=[None, *LORA[1:]])
    with pytest.raises(ValueError, match="without vtab_cifar100"):
        suite_average(without_score)


def test_what_one_average_cannot_hold_is_refused():
    rows = table()
    generated = rows.assign(data_standin=[True, *[False] * 18], task=["vtab_cifar100 (stand-in)", *rows["task"][1:]])
    with pytest.raises(Mixed, match="vtab_cifar100 are generated"):
        suite_average(generated)
    with pytest.raises(ValueError, match="several settings or sources on vtab_dtd"):
        suite_average(pd.concat([rows, rows.query("task == 'vtab_dtd'")]))
    with pytest.raises(ValueError, match="the suites are"):
        suite_average(rows, "vtag")


def test_glue_is_the_mean_of_eight_without_wnli():
    assert set(suite("glue")) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}
    assert len(suite("commonsense")) == 8


def test_the_command_prints_the_averages(tmp_path, capsys):
    for task in suite("glue"):
        synthetic("lora", task, standin=True).save(tmp_path)
    synthetic("bitfit", "rte", standin=True).save(tmp_path)
    assert main(["table", str(tmp_path), "--suite", "glue"]) == 0
    printed = capsys.readouterr().out
    assert "mean8" in printed and "lora (stand-in)" in printed and "bitfit on roberta_base has 1 of 8" in printed
    assert main(["table", str(tmp_path), "--suite", "vtab"]) == 2
    assert "there is no run of it" in capsys.readouterr().err
