"""python -m analysis table|report|plot|compare|recommend|export RUNS: look at a folder of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python -m analysis table results
  python -m analysis report results -o report.html        one file, opens from disk, needs no network
  python -m analysis plot results --task rte --cost memory_peak -o pareto.png
  python -m analysis compare results --methods lora,dora --task rte
  python -m analysis recommend results --max-memory 16GB --max-params 1%
  python -m analysis export results --format latex -o table.tex
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code (2 for input that cannot be used, with the way out on stderr)."""
    args = _parser().parse_args(argv)
    from analysis.fronts import Mixed
    from analysis.runs import NoRuns

    try:
        print(args.run(args))
    except (NoRuns, Mixed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m analysis", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("table", _table, "print scores and costs, one line per task and method"),
        ("report", _report, "write one interactive HTML file"),
        ("plot", _plot, "draw score against cost with its Pareto front (png, svg or pdf)"),
        ("compare", _compare, "test methods against the first, on stored predictions and over tasks"),
        ("recommend", _recommend, "choose a method under a budget, with the evidence"),
        ("export", _export, "write the table as csv, markdown or latex"),
        ("spectra", _spectra, "intruder dimensions: of every ok run, or of --base and --tuned"),
    ):
        command = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=raw)
        command.add_argument("runs", nargs="?", type=Path, default=Path("results"), help="folder of runs (results)")
        command.set_defaults(run=run)
        if name == "report":
            command.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file (report.html)")
            modes = ("off", "auto", "online", "offline")
            command.add_argument("--wandb", choices=modes, default="off", help="also log page, table and plots (off)")
            command.add_argument("--wandb-project", default="paretune", help="project in W&B (paretune)")
        if name == "plot":
            command.add_argument("-o", "--output", type=Path, default=Path("pareto.png"), help="file (pareto.png)")
            command.add_argument("--cost", default="trained_params", help="column of the cost axis (trained_params)")
            command.add_argument("--task", help="the task to draw, where the runs have several")
            command.add_argument("--model", help="the model to draw, where the runs have several")
        if name in ("compare", "recommend", "export"):
            _add_choices(command, name)
        if name == "spectra":
            command.add_argument("--base", help="pretrained: folder, .safetensors file, embedded:NAME or hub id")
            command.add_argument("--tuned", help="the same tuned, or the folder of a peft adapter")
            command.add_argument("--json", type=Path, metavar="FILE", help="write all numbers of --base and --tuned")
            command.add_argument("--k", type=int, default=10, help="leading vectors of each matrix (10)")
            command.add_argument("--root", help="mirror folder of the data, if it is no longer where the runs had it")
            command.add_argument("--device", default="cpu")
    return parser


def _add_choices(command: argparse.ArgumentParser, name: str) -> None:
    part = "COLUMN=TEXT"
    command.add_argument(
        "--where", action="append", default=[], metavar=part, help="only runs whose column has the text"
    )
    if name == "compare":
        command.add_argument("--methods", required=True, help="two or more, e.g. lora,dora; the first is the reference")
    if name == "recommend":
        command.add_argument("--max-memory", metavar="BYTES", help="of peak memory, e.g. 16GB or 500MiB")
        command.add_argument("--max-params", metavar="NUMBER", help="of trained parameters, e.g. 1%% of all, or 500k")
    if name == "export":
        command.add_argument("--format", choices=("csv", "markdown", "latex"), default="csv", help="(csv)")
        command.add_argument("-o", "--output", type=Path, help="file (the terminal)")
    command.add_argument("--task", help="one task only")


def _table(args: argparse.Namespace) -> str:
    from analysis import load, summarise
    from analysis.text import results

    return results(summarise(load(args.runs)))


def _report(args: argparse.Namespace) -> str:
    from analysis import load
    from analysis.report import report

    runs = load(args.runs)
    path = report(runs, args.output)
    said = f"{path} ({path.stat().st_size / 1024:.0f} kB): open it in a browser"
    if args.wandb == "off":
        return said
    import matplotlib

    matplotlib.use("agg")
    from analysis.mirror import mirror

    return f"{said}\n{mirror(runs, path, args.wandb, args.wandb_project)}"


def _runs(args: argparse.Namespace) -> Any:
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


def _compare(args: argparse.Namespace) -> str:
    from analysis.compare import compare

    return compare(_runs(args), [name.strip() for name in args.methods.split(",") if name.strip()])


def _recommend(args: argparse.Namespace) -> str:
    from analysis.recommend import recommend

    return recommend(_runs(args), args.max_memory, args.max_params)


def _export(args: argparse.Namespace) -> str:
    from analysis import summarise
    from analysis.export import export

    text = export(summarise(_runs(args)), args.format)
    if args.output is None:
        return text.rstrip("\n")
    args.output.write_text(text)
    return str(args.output)


def _plot(args: argparse.Namespace) -> str:
    import matplotlib

    matplotlib.use("agg")
    from analysis import load, plots, summarise

    table = summarise(load(args.runs))
    for column in ("task", "model"):
        table = _choose(table, column, getattr(args, column))
    figure: Any = plots.pareto(table, args.cost).figure
    figure.savefig(args.output, dpi=160)
    return str(args.output)


def _spectra(args: argparse.Namespace) -> str:
    from analysis.spectra_runs import of_checkpoints, of_records

    if bool(args.base) != bool(args.tuned):
        raise ValueError("give both --base and --tuned, or neither and a folder of runs")
    try:
        if args.base:
            return of_checkpoints(args.base, args.tuned, args.json, args.device, args.k)
        return of_records(args.runs, args.root, args.device, args.k)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def _choose(table: Any, column: str, wanted: str | None) -> Any:
    """The rows of one task or model; which one must be said where there are several."""
    names = sorted(table[column].unique())
    if wanted is None and len(names) > 1:
        raise ValueError(f"the runs have several {column}s: choose one with --{column}: {', '.join(names)}")
    if wanted is not None and wanted not in names:
        raise ValueError(f"--{column} {wanted!r} is not in the runs; they have {', '.join(names)}")
    return table if wanted is None else table[table[column] == wanted]


if __name__ == "__main__":
    sys.exit(main())
