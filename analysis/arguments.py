"""What commands share: which runs are meant, in which form a table is written, and where it goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FORMS = ("text", "csv", "markdown", "latex")


def add_choice(command: argparse.ArgumentParser) -> None:
    """--where and --task."""
    part = "COLUMN=TEXT"
    command.add_argument(
        "--where", action="append", default=[], metavar=part, help="only runs whose column has the text"
    )
    command.add_argument("--task", help="one task only")


def add_form(command: argparse.ArgumentParser, forms: tuple[str, ...] = FORMS) -> None:
    """--format and -o; the first of `forms` is the default."""
    command.add_argument("--format", choices=forms, default=forms[0], help=f"({forms[0]})")
    command.add_argument("-o", "--output", type=Path, help="file (the terminal)")


def put(text: str, output: Path | None) -> str:
    """Write the text and return the file's name, or without a file the text."""
    if output is None:
        return text.rstrip("\n")
    output.write_text(text.rstrip("\n") + "\n")
    return str(output)


def chosen_runs(args: argparse.Namespace) -> Any:
    """The runs that --where and --task leave."""
    from analysis import load

    runs = load(args.runs)
    for column, text in (condition.partition("=")[::2] for condition in args.where):
        if column not in runs:
            raise ValueError(f"--where {column}={text}: no such column; there are {', '.join(runs.columns[:30])}, ...")
        found = runs[runs[column].astype(str).str.contains(text, regex=False)]
        if found.empty:
            some = ", ".join(sorted({str(v) for v in runs[column]})[:8])
            raise ValueError(f"--where {column}={text}: no run; the values are {some}")
        runs = found
    if args.task is not None and args.task not in set(runs["task"]):
        raise ValueError(f"--task {args.task!r} is not in the runs; they have {', '.join(sorted(set(runs['task'])))}")
    return runs if args.task is None else runs[runs["task"] == args.task]
