"""The commands around spectra: spectra, sizes, findings, forgetting, causal, dynamics, continual."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

K = 10  # this and those below as in `analysis.spectra`, `causal` and `sizes`, which need torch
LAMBDAS, WHICH, SIZES = "0,0.25,0.5,0.75,0.9,1,1.5,2", ("top", "all"), "0.05,0.1,0.2"


def add(commands: Any, **options: Any) -> None:
    """Add the subcommands; options: of each `add_parser`."""
    for name, run, text in (
        ("spectra", _spectra, "intruder dimensions: of every ok run, or of --base and --tuned"),
        ("sizes", _sizes, "intruders with every change scaled to the same size: rank or size?"),
        ("findings", _findings, "all of it per setting, with intervals over seeds, and correlations over runs"),
        ("forgetting", _forgetting, "loss on a pretraining-like text (images: a probe's accuracy), before and after"),
        ("causal", _causal, "scale the top intruder of each matrix, and a neighbour: score and forgetting"),
        ("dynamics", _dynamics, "intruders over the steps of a run with spectra_every=N, and the life of one"),
        ("continual", _continual, "tasks one after the other, each merged: scores and intruders per stage"),
    ):
        command = commands.add_parser(name, help=text, description=text, **options)
        command.add_argument("runs", nargs="?", type=Path, default=Path("results"), help="folder of runs (results)")
        command.set_defaults(run=run)
        if name in ("spectra", "sizes", "forgetting", "causal"):
            command.add_argument("--root", help="mirror folder of the data, if it is no longer where the runs had it")
            command.add_argument("--device", default="cpu")
        if name in ("spectra", "sizes", "causal"):
            command.add_argument("--k", type=int, default=K, help=f"leading vectors of each matrix ({K})")
        if name in ("causal", "dynamics", "continual"):
            command.add_argument("-o", "--output", type=Path, help="also draw it: png, svg or pdf")
        _ADD.get(name, lambda command: None)(command)


def _add_spectra(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", help="pretrained: folder, .safetensors file, embedded:NAME or hub id")
    command.add_argument("--tuned", help="the same tuned, or the folder of a peft adapter")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all numbers of --base and --tuned")


def _add_sizes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sizes", default=SIZES, help=f"norms of a change over that of its matrix ({SIZES})")


def _add_forgetting(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text", help="wikipedia, wikitext, reviews or python (wikipedia where it can be had)")


def _add_causal(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lambdas", default=LAMBDAS, help=f"factors; 0 removes, 1 leaves ({LAMBDAS})")
    command.add_argument("--which", choices=WHICH, default="top", help="intruders of a matrix that are scaled (top)")
    help = "split that is scored; test is for a factor that val has chosen (val)"
    command.add_argument("--split", choices=("val", "test"), default="val", help=help)


def _add_continual(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tasks", required=True, help="two or more, in order: rotten_tomatoes,stsb")
    help = "as for python -m bench: method=lora seed=1"
    command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides", help=help)


_ADD = {
    "spectra": _add_spectra,
    "sizes": _add_sizes,
    "forgetting": _add_forgetting,
    "causal": _add_causal,
    "continual": _add_continual,
}


def _spectra(args: argparse.Namespace) -> str:
    from analysis.spectra_runs import of_checkpoints, of_records

    if bool(args.base) != bool(args.tuned):
        raise ValueError("give both --base and --tuned, or neither and a folder of runs")
    if args.k < 1:
        raise ValueError(f"--k {args.k} must be at least 1")
    try:
        if args.base:
            return of_checkpoints(args.base, args.tuned, args.json, args.device, args.k)
        return of_records(args.runs, args.root, args.device, args.k)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def _sizes(args: argparse.Namespace) -> str:
    from analysis.sizes import of_records

    return of_records(args.runs, _numbers("--sizes", args.sizes), args.root, args.device, args.k)[0]


def _findings(args: argparse.Namespace) -> str:
    from analysis.findings import text

    return text(args.runs)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: give numbers, comma-separated: 0,0.5,1") from error


def _forgetting(args: argparse.Namespace) -> str:
    from analysis.forgetting import of_records

    return of_records(args.runs, args.root, args.device, args.text)


def _causal(args: argparse.Namespace) -> str:
    import pandas as pd

    from analysis.causal import effects_text, of_records
    from analysis.causal_plots import lambdas

    factors = _numbers("--lambdas", args.lambdas)
    said = of_records(args.runs, factors, args.root, args.device, which=args.which, split=args.split, k=args.k)
    found = sorted(args.runs.glob("causal.parquet")) or sorted(args.runs.glob("*/causal.parquet"))
    if not found:
        return said
    table = pd.concat([pd.read_parquet(p) for p in found])
    together = f"\n\n{effects_text(table)}" if len(found) > 1 and 1 in factors else ""
    return said + together + _draw(lambdas, table, args.output)


def _dynamics(args: argparse.Namespace) -> str:
    import pandas as pd

    from analysis.causal_plots import dynamics
    from analysis.dynamics import births

    found = sorted(args.runs.glob("dynamics.parquet")) or sorted(args.runs.glob("*/dynamics.parquet"))
    if not found:
        raise ValueError(f"{args.runs}: no dynamics.parquet; python -m bench ... spectra_every=50 makes one")
    tables = {path.parent.name: births(pd.read_parquet(path)) for path in found}
    said = "\n\n".join(f"{name}\n{table.to_string(index=False)}" for name, table in tables.items())
    return said + _draw(dynamics, pd.concat([t.assign(run=n) for n, t in tables.items()]), args.output)


def _continual(args: argparse.Namespace) -> str:
    import pandas as pd

    from analysis.causal_plots import stages
    from analysis.continual import command

    said = command(args.runs, [t.strip() for t in args.tasks.split(",") if t.strip()], args.overrides)
    return said + _draw(stages, pd.read_parquet(said.splitlines()[-1]), args.output)


def _draw(plot: Any, table: Any, output: Path | None) -> str:
    if output is None:
        return ""
    import matplotlib

    matplotlib.use("agg")
    plot(table).figure.savefig(output, dpi=160)
    return f"\n{output}"
