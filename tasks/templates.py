"""Templates over the columns of a row: "Question: {question}", and paths into structs: `choices.text`."""

from __future__ import annotations

import re
from typing import Any


def named(template: str) -> list[str]:
    """The columns that a template names; none for a plain text."""
    return re.findall(r"{(\w+)", template)


def at(row: dict[str, Any], path: str) -> Any:
    """The value of a column, or of `column.key` where the column holds a struct."""
    column, _, key = path.partition(".")
    return row[column][key] if key else row[column]
