"""A short hash of rows and their ids, which tells whether two runs saw the same; reading all of them finds broken images."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from tasks.splits import STRIDE

if TYPE_CHECKING:
    from datasets import Dataset


def fingerprint(rows: Dataset, where: str = "") -> str:
    """The first 16 hex digits of a SHA-256 over ids and contents (of images: their pixels), in order.

    Raises ValueError with `where` and the row for an image that cannot be decoded.
    """
    digest = hashlib.sha256()
    names = sorted(rows.column_names)
    try:
        for batch in rows.iter(1000):
            for values in zip(*(batch[n] for n in names), strict=True):  # type: ignore[index]
                digest.update(json.dumps(values, default=_pixels).encode() + b"\n")
    except (OSError, SyntaxError) as error:  # what Pillow raises for broken files
        raise ValueError(f"{where} {_broken(rows)}") from error
    return digest.hexdigest()[:16]


def _broken(rows: Dataset) -> str:
    """The first row that cannot be decoded, in words."""
    for i, name in enumerate(rows["row_id"]):
        try:
            rows[i]
        except (OSError, SyntaxError) as error:
            said = str(error).splitlines()[0]
            return f"row {i} (row_id {name}, row {name % STRIDE} of its public split) is broken: {said}"
    return "cannot be read"


def _pixels(image: Any) -> list[Any]:
    return [image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]
