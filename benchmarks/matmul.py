"""Seconds of a frozen linear layer and of its input's gradient on a CPU: torch's own products against oneDNN's, in turn.

python -m benchmarks.matmul [--rounds 15] [--threads 2]

Two floors: the CPU's peak is not known here, so the fastest product of the table stands for it; and for few rows the seconds
that reading the weight takes, at the speed of a copy of as many bytes. `auto` says which of the two a run on this machine takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from bench import matmul

SHAPES = ((512, 128), (384, 384), (1536, 384), (768, 768), (3072, 768), (49152, 576))  # out, in
ROWS = (28, 80, 640, 2560)  # decoding, a small batch, a batch, a large one
SIDES = ("torch", "onednn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    matmul.use("auto")
    print(f"matmul=auto is {matmul.used()} here; {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(
        f"{'out x in':>12} {'rows':>5} {'torch ms':>9} {'onednn ms':>9} {'GFLOP/s':>13} {'torch/onednn':>12} {'read ms':>8}"
    )
    for out, into in SHAPES:
        for rows in ROWS if out < 10_000 else ROWS[:2]:
            print(line(rows, out, into, args.rounds), flush=True)


def line(rows: int, out: int, into: int, rounds: int) -> str:
    """The medians of both sides, forward and gradient together, and what reading the weight twice takes."""
    x, w, b = torch.randn(rows, into, requires_grad=True), torch.randn(out, into), torch.randn(out)
    g, copy = torch.randn(rows, out), torch.empty_like(w)

    def both() -> None:
        torch.autograd.grad(F.linear(x, w, b), x, g)

    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):  # the first warms up
        for side in SIDES[:: 1 if number % 2 else -1]:
            matmul.use(side)
            spent[side].append(seconds(both))
    ours, theirs = (statistics.median(spent[side][1:]) for side in reversed(SIDES))
    ratio = statistics.median(t / o for t, o in list(zip(*(spent[s] for s in SIDES), strict=True))[1:])
    speeds = " to ".join(f"{4 * rows * out * into / s / 1e9:.0f}" for s in (theirs, ours))
    read = statistics.median(seconds(lambda: copy.copy_(w)) for _ in range(rounds))  # reads and writes once
    return f"{f'{out} x {into}':>12} {rows:5} {theirs * 1e3:9.3f} {ours * 1e3:9.3f} {speeds:>13} {ratio:12.2f} {read * 1e3:8.3f}"


def seconds(compute: Callable[[], object]) -> float:
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
