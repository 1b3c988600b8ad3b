"""Seconds for the spectrum of one tuned matrix: the fast path with the base's decomposition kept, against full SVDs.

python -m benchmarks.spectra [--shapes 768x768,768x3072] [--rounds 5] [--sides paper,fast] [--threads 1] [--device cpu]

Pretrained matrices with a power-law spectrum. The changes: of rank 8, as LoRA makes them, and dense, as full fine-tuning.
Three sides take turns, and the table shows the medians of the rounds:

  paper   what the paper's code does: float32 SVDs of both matrices, cosines of the ten leading left vectors
  full    the same table of measures as the fast side by full float64 SVDs of W0, W1 and the change
  fast    `analysis.spectra.measure` with the base on disk, its reading and hashing included

One thread on a CPU is timed by the process's CPU seconds, which other programs disturb little; else by the wall clock.
The floor of the fast side: hash W0, read its U and V, one product of W1 with ten vectors and back.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.decompose import cached
from analysis.spectra import K, measure

SHAPES = "768x768,3072x768,768x3072"


def pretrained(rows: int, columns: int, device: str) -> Tensor:
    """A matrix with singular values i^-0.7 and a flat tail, as trained weights have it, without the cost of an SVD."""
    g = torch.Generator().manual_seed(0)
    n = min(rows, columns, 256)
    U = torch.linalg.qr(torch.randn(rows, n, generator=g))[0]
    V = torch.linalg.qr(torch.randn(columns, n, generator=g))[0]
    noise = torch.randn(rows, columns, generator=g) * 0.02 / rows**0.5
    return ((U * torch.arange(1, n + 1) ** -0.7) @ V.T + noise).to(device)


def tuned(W0: Tensor, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(1)
    rows, columns = W0.shape
    if kind == "rank 8":
        change = torch.randn(rows, 8, generator=g) @ torch.randn(8, columns, generator=g) / (rows * columns) ** 0.5
    else:
        change = 0.1 * torch.randn(rows, columns, generator=g) / rows**0.5
    return W0 + change.to(W0)


def paper(W0: Tensor, W1: Tensor) -> Tensor:
    U0 = torch.linalg.svd(W0, full_matrices=False)[0]
    U1 = torch.linalg.svd(W1, full_matrices=False)[0]
    return (U0.T @ U1[:, :K]).abs().max(0).values


def floor(W0: Tensor, W1: Tensor, folder: Path) -> Tensor:
    base = cached(W0, folder)
    return W1 @ (W1.T @ base.U[:, :K])


def timed(side: Callable[[], Any], device: str) -> float:
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    side()
    if device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def row(shape: tuple[int, int], kind: str, rounds: int, device: str, chosen: list[str]) -> str:
    """One line of the table; sides that are not chosen stay empty."""
    W0 = pretrained(*shape, device)
    W1 = tuned(W0, kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fast = measure(W0, W1, folder=folder)
        cosines: list[Tensor] = []
        sides: dict[str, Callable[[], Any]] = {
            "paper": lambda: cosines.append(paper(W0, W1).cpu()),
            "full": lambda: measure(W0, W1, exact=True),
            "fast": lambda: measure(W0, W1, folder=folder),
            "floor": lambda: floor(W0, W1, folder),
        }
        times = [{name: timed(sides[name], device) for name in chosen} for _ in range(rounds)]
    seconds = {name: statistics.median(t[name] for t in times) for name in chosen}
    ratios = {
        name: statistics.median(t[name] / t["fast"] for t in times) for name in ("paper", "full") if name in chosen
    }
    shown = "  ".join(f"{seconds[name] * 1000:9.1f}" if name in chosen else f"{'-':>9}" for name in sides)
    times_as_fast = " ".join(f"{ratios[n]:8.1f}" if n in ratios else f"{'-':>8}" for n in ("paper", "full"))
    error = float((cosines[-1] - torch.tensor(fast["cos_left"])).abs().max()) if cosines else float("nan")
    return f"{shape[0]}x{shape[1]:<6} {kind:7} {shown}  {times_as_fast}  {error:8.1e}  {fast['solver']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help=f"out x in, comma-separated ({SHAPES})")
    parser.add_argument("--kinds", default="rank 8,dense")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sides", default="paper,full,fast,floor", help="of these; fast always (paper,full,fast,floor)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = " ".join(f"{n:.1f}" for n in os.getloadavg())
    about = f"torch {torch.__version__}, {args.device}, {args.threads} threads, load {load}"
    print(f"{about}; median of {args.rounds} rounds; ms")
    names = "  ".join(f"{name:>9}" for name in ("paper", "full", "fast", "floor"))
    print(f"{'shape':11} {'change':7} {names}  {'x paper':>8} {'x full':>8}  {'cosine':>8}  solver")
    for text in args.shapes.split(","):
        rows, columns = (int(n) for n in text.split("x"))
        for kind in args.kinds.split(","):
            chosen = [name for name in args.sides.split(",") if name != "fast"] + ["fast"]
            print(row((rows, columns), kind, args.rounds, args.device, chosen), flush=True)


if __name__ == "__main__":
    main()
