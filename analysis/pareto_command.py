"""`python -m analysis pareto`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from analysis.arguments import add_choice, add_form, chosen_runs, put

EPSILON = 0.01  # of a score in [0, 1]: one point


def add(commands: Any, **options: Any) -> None:
    """Add the subcommand; options: of `add_parser`."""
    text = "print the Pareto front, with the chance of being on it"
    command = commands.add_parser("pareto", help=text, description=text, **options)
    command.add_argument("runs", nargs="?", type=Path, default=Path("results"), help="folder of runs (results)")
    command.add_argument("--cost", default="trained_params", help="one or two columns, e.g. memory_peak,time_step")
    command.add_argument("--score", default="score", help="column of the score, e.g. metrics_test/f1 (score)")
    command.add_argument("--lower", action="store_true", help="the score is an error: lower is better")
    command.add_argument("--epsilon", type=float, default=EPSILON, help=f"of the score, does not matter ({EPSILON})")
    command.add_argument("--all", action="store_true", help="also the methods that are not on the front")
    add_choice(command)
    add_form(command)
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    from analysis.compare import prepared
    from analysis.front_table import front_table, write_front

    runs, note = prepared(chosen_runs(args))
    costs = [name.strip() for name in args.cost.split(",")]
    table = front_table(runs, costs, args.score, lower=args.lower, epsilon=args.epsilon)
    shown = table if args.all else table[table["front"]]
    return put(write_front(shown, costs, args.score, args.format, [note] if note else []), args.output)
