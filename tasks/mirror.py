"""A mirror: a folder in the hub's layout, which `datasets.load_dataset` reads without a network.

    <root>/<hub id>/README.md                                YAML front matter: the configs and their features
    <root>/<hub id>/<config>/<split>-00000-of-00001.parquet
    <root>/<hub id>/<config>/source.json                     where the rows come from, licence, rows per split

Each config is written to a temporary folder and renamed into place; the other configs of a data set are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import write_atomically
from bench.registry import Package, cache

if TYPE_CHECKING:
    from datasets import Dataset, Features

Row = dict[str, Any]


class Mismatch(RuntimeError):
    """Rows or labels on disk are not what they should be."""


@dataclass(frozen=True)
class Source:
    """Where the rows of one data set can be had besides the hub, and what they must look like.

    `columns` maps a column to its type: a dtype of `datasets.Value`, "image", a tuple of class names, a list of one
    type for a list, or a dict for a struct. `rows` holds the expected number of rows per split.
    """

    path: str
    name: str
    columns: Mapping[str, Any]
    rows: Mapping[str, int]
    read: Callable[[], dict[str, Sequence[Row]]]
    packages: tuple[Package, ...]
    licence: str
    note: str = ""

    def describe(self) -> dict[str, Any]:
        """What `source.json` says."""
        packages = [dataclasses.asdict(p) for p in self.packages]
        return {"kind": "package", "licence": self.licence, "note": self.note, "packages": packages}


def default_root() -> Path:
    return cache() / "mirror"


def config_folder(root: Path, path: str, name: str | None) -> Path:
    """The folder of one config; a data set without named configs lies in `default`."""
    return Path(root) / path / (name or "default")


def build(source: Source, root: Path) -> dict[str, int]:
    """Read the rows out of their packages, check them, write them; return rows per split."""
    from datasets import Dataset

    typed = features(source.columns)
    splits = {split: Dataset.from_list(list(rows), features=typed) for split, rows in source.read().items()}
    found = {split: len(rows) for split, rows in splits.items()}
    if found != dict(source.rows):
        raise Mismatch(f"{source.path} {source.name}: {found} rows in its packages, expected {dict(source.rows)}")
    write(root, source.path, source.name, splits, source.describe())
    return found


def copy_hub(root: Path, path: str, name: str | None, revision: str | None) -> dict[str, int]:
    """Load one config from the hub and write it in the same layout; return rows per split."""
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    try:
        splits = load_dataset(path, name, revision=revision)
    except (OSError, ValueError, HfHubHTTPError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        raise Mismatch(f"{path} {name or ''}: the hub cannot be read ({type(error).__name__}: {error})") from error
    licence = next(iter(splits.values())).info.license or "see the hub"
    return write(root, path, name, dict(splits), {"kind": "hub", "revision": revision, "licence": licence})


def write(
    root: Path, path: str, name: str | None, splits: Mapping[str, Dataset], source: dict[str, Any]
) -> dict[str, int]:
    """Write all splits of one config and its `source.json`, then put it in place and update the README."""
    final = config_folder(root, path, name)
    final.parent.mkdir(parents=True, exist_ok=True)
    rows = {split: len(data) for split, data in splits.items()}
    with _locked(final.parent), tempfile.TemporaryDirectory(dir=final.parent, prefix=".writing-") as folder:
        new = Path(folder) / "new"
        new.mkdir()
        for split, data in splits.items():
            data.to_parquet(new / f"{split}-00000-of-00001.parquet")
        stated = source | {"path": path, "name": name, "rows": rows}
        write_atomically(new / "source.json", json.dumps(stated, indent=1) + "\n")
        if (written := _count(new)) != rows:
            raise Mismatch(f"{final}: {written} rows after writing, expected {rows}; is the disk full?")
        if final.exists():
            final.rename(Path(folder) / "old")
        new.rename(final)
        _add_to_readme(final, next(iter(splits.values())).features, list(splits))
    return rows


def features(columns: Mapping[str, Any]) -> Features:
    """The `datasets.Features` of a column table; see Source."""
    from datasets import ClassLabel, Features, Image, List, Value

    def one(kind: Any) -> Any:
        if isinstance(kind, tuple):
            return ClassLabel(names=list(kind))
        if isinstance(kind, list):
            return List(one(kind[0]))
        if isinstance(kind, dict):
            return {key: one(inner) for key, inner in kind.items()}
        return Image() if kind == "image" else Value(kind)

    return Features({column: one(kind) for column, kind in columns.items()})


def stated(folder: Path) -> dict[str, Any] | None:
    """What `source.json` of a config folder says; None where there is none (a mirror made by other means)."""
    file = folder / "source.json"
    return json.loads(file.read_text()) if file.exists() else None


def size(folder: Path) -> int | None:
    """Bytes of a config's Parquet files; None when it is not there."""
    files = list(folder.glob("*.parquet"))
    return sum(file.stat().st_size for file in files) if files else None


def verify(folder: Path, expected: Mapping[str, int] | None = None) -> dict[str, int]:
    """Rows per split of what is present. Raises Mismatch when rows or labels differ from `expected` or the features.

    `expected` defaults to what `source.json` says. Labels must lie in their class list (-1 marks an unlabelled row).
    """
    rows = _count(folder)
    expected = expected or (stated(folder) or {}).get("rows") or rows
    if rows != dict(expected):
        raise Mismatch(f"{folder}: {rows} rows, expected {dict(expected)}; fetch it again (--force)")
    for file in sorted(folder.glob("*.parquet")):
        _verify_labels(file)
    return rows


def _verify_labels(file: Path) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features

    schema = pq.read_schema(file)
    classes = {c: f for c, f in Features.from_arrow_schema(schema).items() if isinstance(f, ClassLabel)}
    for column, feature in classes.items():
        found = set(pc.unique(pq.read_table(file, columns=[column])[column]).to_pylist())
        known = set(range(feature.num_classes))
        if found - known - {-1} or (file.name.startswith("train") and known - found):
            raise Mismatch(f"{file}: column {column!r} holds {sorted(found)}, its classes are {feature.names}")


def _count(folder: Path) -> dict[str, int]:
    import pyarrow.parquet as pq

    rows: dict[str, int] = {}
    for file in sorted(folder.glob("*.parquet")):
        split = file.name.split("-")[0]
        rows[split] = rows.get(split, 0) + pq.read_metadata(file).num_rows
    return rows


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer per data set: its configs share a README."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _add_to_readme(folder: Path, typed: Features, splits: list[str]) -> None:
    """State the config in the front matter of the data set's README, keeping the entries of its other configs."""
    import yaml
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    readme, name = folder.parent / "README.md", folder.name
    front, body = _front_matter(readme)
    card = DatasetCardData()
    DatasetInfosDict({name: DatasetInfo(features=typed, config_name=name)}).to_dataset_card_data(card)
    files = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
    for key, entry in (
        ("configs", {"config_name": name, "data_files": files}),
        ("dataset_info", card.to_dict()["dataset_info"]),
    ):
        kept = front.get(key) or []
        kept = [e for e in ([kept] if isinstance(kept, dict) else kept) if e["config_name"] != name]
        front[key] = sorted([*kept, {"config_name": name} | entry], key=lambda e: e["config_name"])
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    write_atomically(readme, f"---\n{text}---\n{body}")


def _front_matter(readme: Path) -> tuple[dict[str, Any], str]:
    import yaml

    text = readme.read_text() if readme.exists() else ""
    if not text.startswith("---\n"):
        return {}, text or "Rows in the hub's layout, written by `python -m tasks fetch`; see `*/source.json`.\n"
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head) or {}, body
