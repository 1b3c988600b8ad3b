"""python -m analysis table|pareto|report|plot|compare|recommend|export|spectra RUNS: look at a folder of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from analysis import pareto_command, spectra_command
from analysis.arguments import FORMS, add_choice, add_form, chosen_runs, put

EXAMPLES = """examples:
  python -m analysis table results
  python -m analysis report results -o report.html        one file, opens from disk, needs no network
  python -m analysis plot results --task rte --cost memory_peak -o pareto.png
  python -m analysis compare results --methods lora,dora --task rte
  python -m analysis recommend results --max-memory 16GB --max-params 1%
  python -m analysis pareto results --cost memory_peak        with the chance of being on the front
  python -m analysis export results --format latex -o table.tex
  python -m analysis spectra results        or --base A --tuned B
  python -m analysis sizes results          every change at the same size: is it rank, or size?
  python -m analysis forgetting results
  python -m analysis findings results
  python -m analysis dynamics results/<id> -o steps.png
  python -m analysis causal results/<id> --lambdas 0,0.5,1,2 -o lambda.png
  python -m analysis continual results --tasks rotten_tomatoes,stsb --set method=lora train.epochs=1
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
    ):
        command = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=raw)
        command.add_argument(
            "runs", nargs="?", type=Path, default=Path("results"), help="folder or collected file (results)"
        )
        command.set_defaults(run=run)
        if name == "table":
            command.add_argument("--suite", help="its averages: vtab, glue, commonsense or fgvc")
        if name == "report":
            command.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file (report.html)")
            modes = ("off", "auto", "online", "offline")
            command.add_argument("--wandb", choices=modes, default="off", help="also log page, table and plots (off)")
            command.add_argument("--wandb-project", default="paretune", help="project in W&B (paretune)")
            command.add_argument("--wandb-chart", metavar="ENTITY/NAME", help="saved panel (python -m analysis.panels)")
        if name == "plot":
            command.add_argument("-o", "--output", type=Path, default=Path("pareto.png"), help="file (pareto.png)")
            command.add_argument("--cost", default="trained_params", help="column of the cost axis (trained_params)")
            command.add_argument("--task", help="the task to draw, where the runs have several")
            command.add_argument("--model", help="the model to draw, where the runs have several")
        if name in ("table", "compare", "recommend", "export"):
            _add_choices(command, name)
    pareto_command.add(commands, epilog=EXAMPLES, formatter_class=raw)
    spectra_command.add(commands, epilog=EXAMPLES, formatter_class=raw)
    return parser


def _add_choices(command: argparse.ArgumentParser, name: str) -> None:
    add_choice(command)
    if name == "compare":
        command.add_argument("--methods", required=True, help="two or more, e.g. lora,dora; the first is the reference")
    if name == "recommend":
        command.add_argument("--max-memory", metavar="BYTES", help="of peak memory, e.g. 16GB or 500MiB")
        command.add_argument("--max-params", metavar="NUMBER", help="of trained parameters, e.g. 1%% of all, or 500k")
    else:
        add_form(command, FORMS[1:] if name == "export" else FORMS)


def _table(args: argparse.Namespace) -> str:
    from analysis import summarise
    from analysis.export import export
    from analysis.text import results

    table = summarise(chosen_runs(args))
    if args.suite is None:
        return put(results(table) if args.format == "text" else export(table, args.format), args.output)
    from analysis import suites

    return suites.text(table, args.suite)


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

    return f"{said}\n{mirror(runs, path, args.wandb, args.wandb_project, args.wandb_chart)}"


def _compare(args: argparse.Namespace) -> str:
    from analysis import compare

    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    if args.format == "text":
        return put(compare.compare(chosen_runs(args), methods), args.output)
    return put(compare.table(chosen_runs(args), methods, args.format), args.output)


def _recommend(args: argparse.Namespace) -> str:
    from analysis.recommend import recommend

    return recommend(chosen_runs(args), args.max_memory, args.max_params)


def _export(args: argparse.Namespace) -> str:
    from analysis import summarise
    from analysis.export import export

    return put(export(summarise(chosen_runs(args)), args.format), args.output)


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
