"""Seconds for the spectrum of one tuned matrix: the fast path with the base's decomposition kept, against full SVDs.

python -m benchmarks.spectra [--shapes 768x768,768x3072] [--rounds 5] [--sides paper,fast] [--parts] [--threads 1] [--device cpu]

Pretrained matrices with a power-law spectrum. The changes: of rank 8, as LoRA makes them; tuned, as full fine-tuning makes
them: dense, of 0.05 of the matrix's norm, a power law above a floor of noise; and noise, dense and as large as the matrix.
The sides take turns, and the table shows the medians of the rounds; the base is on disk, its reading and hashing are part of
the time:

  full         the same table of measures as the fast side by full float64 SVDs of W0, W1 and the change
  fast         `analysis.spectra.measure`
  paper        what the paper's code does: float32 SVDs of both matrices, cosines of the ten leading left vectors
  full-counts  cosines, counts and windows of both sides alone by full float64 SVDs of W0 and W1
  counts       the same by the fast path, as `analysis.sizes` and `analysis.causal` use it; x paper is against this one

One thread on a CPU is timed by the process's CPU seconds, which other programs disturb little; else by the wall clock.
The floor of the fast side: hash W0, read its U and V, one product of W1 with ten vectors and back. --parts: what each part
of the fast side takes, so what each group of measures costs.
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

from analysis import spectra
from analysis.decompose import cached, top
from analysis.gram import thin
from analysis.low_rank import guess, low_rank
from analysis.spectra import K, measure

ROBERTA = {"768x768": 48, "3072x768": 12, "768x3072": 12}  # how many of its 72 matrices have each shape
SHAPES, KINDS = ",".join(ROBERTA), "rank 8,tuned,noise"
SIDES = ("paper", "full", "fast", "full-counts", "counts", "floor")
RATIOS = {"x paper": ("paper", "counts"), "x full": ("full", "fast"), "x counts": ("full-counts", "counts")}


def pretrained(rows: int, columns: int, device: str, seed: int = 0) -> Tensor:
    """A matrix with singular values i^-0.7 and a flat tail, as trained weights have it, without the cost of an SVD."""
    g = torch.Generator().manual_seed(seed)
    n = min(rows, columns, 256)
    U = torch.linalg.qr(torch.randn(rows, n, generator=g))[0]
    V = torch.linalg.qr(torch.randn(columns, n, generator=g))[0]
    noise = torch.randn(rows, columns, generator=g) * 0.02 / rows**0.5
    return ((U * torch.arange(1, n + 1) ** -0.7) @ V.T + noise).to(device)


def tuned(W0: Tensor, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(1)
    rows, columns = W0.shape
    if kind not in KINDS.split(","):
        raise ValueError(f"--kinds {kind!r}: the changes are {KINDS}")
    if kind == "tuned":
        change = pretrained(rows, columns, "cpu", seed=1)
        change *= 0.05 * float(W0.norm() / change.norm())
    elif kind == "rank 8":
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
    return thin(W1, thin(W1.T, base.U[:, :K]))


def parts(W0: Tensor, W1: Tensor, folder: Path, rounds: int, device: str) -> str:
    """Median milliseconds of the steps of `measure` one by one."""
    base, D, limit = cached(W0, folder), W1 - W0, spectra.rounding(W1)
    change = low_rank(D, limit.frobenius + 1e-6 * float(D.norm()))
    leading = top(W1, K, *guess(base, change, K))
    found = spectra._spectrum(D, change, K, limit.spectral)
    steps: dict[str, Callable[[], Any]] = {
        "hash and read the base": lambda: cached(W0, folder),
        "is the change of low rank?": lambda: low_rank(D, limit.frobenius + 1e-6 * float(D.norm())),
        "leading vectors of W1": lambda: top(W1, K, *guess(base, change, K)),
        "cosines, windows, overlap": lambda: spectra.compare(base, leading),
        "whole spectrum of the change": lambda: spectra._spectrum(D, change, K, limit.spectral),
        "ranks, size and place of it": lambda: spectra.update(base, found, float(D.norm()), limit.spectral),
    }
    times = {name: statistics.median(timed(step, device) for _ in range(rounds)) for name, step in steps.items()}
    return ", ".join(f"{name} {1000 * t:.1f}" for name, t in times.items())


def timed(side: Callable[[], Any], device: str) -> float:
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    side()
    if device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def sides(W0: Tensor, W1: Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    def counts(exact: bool) -> Any:
        base, leaders, _ = spectra.leading(W0, W1, K, None if exact else folder, exact)
        return spectra.compare(base, leaders)

    return {
        "paper": lambda: paper(W0, W1).cpu(),
        "full": lambda: measure(W0, W1, exact=True),
        "fast": lambda: measure(W0, W1, folder=folder),
        "full-counts": lambda: counts(True),
        "counts": lambda: counts(False),
        "floor": lambda: floor(W0, W1, folder),
    }


def row(shape: str, kind: str, args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """One line of the table, where sides that are not chosen stay empty, and their median seconds."""
    W0 = pretrained(*(int(n) for n in shape.split("x")), args.device)
    W1 = tuned(W0, kind)
    chosen = [name for name in SIDES if name in args.sides.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        calls = sides(W0, W1, Path(folder))
        fast = calls["fast"]()
        error = float((calls["paper"]() - torch.tensor(fast["cos_left"])).abs().max()) if "paper" in chosen else None
        times = [{name: timed(calls[name], args.device) for name in chosen} for _ in range(args.rounds)]
        steps = "\n    " + parts(W0, W1, Path(folder), args.rounds, args.device) if args.parts else ""
    seconds = {name: statistics.median(t[name] for t in times) for name in chosen}
    shown = "".join(f"{1000 * seconds[name]:12.1f}" if name in chosen else f"{'-':>12}" for name in SIDES)
    ratios = "".join(
        _ratio([t[slow] / t[quick] for t in times]) if {slow, quick} <= seconds.keys() else f"{'-':>10}"
        for slow, quick in RATIOS.values()
    )
    found = f"{error:9.1e}" if error is not None else f"{'-':>9}"
    return f"{shape:10} {kind:7}{shown}{ratios}{found}  {fast['solver']}{steps}", seconds


def _ratio(found: list[float]) -> str:
    return f"{statistics.median(found):10.1f}"


def whole(kind: str, seconds: dict[str, dict[str, float]]) -> str:
    """The sum over the matrices of RoBERTa-base, where all of its shapes were timed."""
    total = {
        name: sum(n * seconds[shape][name] for shape, n in ROBERTA.items()) for name in seconds[next(iter(ROBERTA))]
    }
    ratios = [f"{label} {total[a] / total[b]:.1f}" for label, (a, b) in RATIOS.items() if {a, b} <= total.keys()]
    return f"RoBERTa-base, {kind}: {', '.join(f'{n} {t:.2f} s' for n, t in total.items())}; {', '.join(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help=f"out x in, comma-separated ({SHAPES})")
    parser.add_argument("--kinds", default=KINDS, help=f"changes ({KINDS})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of these ({','.join(SIDES)})")
    parser.add_argument("--parts", action="store_true", help="also the steps of the fast side one by one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = " ".join(f"{n:.1f}" for n in os.getloadavg())
    about = f"torch {torch.__version__}, {args.device}, {args.threads} threads, load {load}"
    print(f"{about}; median of {args.rounds} rounds; ms")
    print(
        f"{'shape':10} {'change':7}{''.join(f'{n:>12}' for n in SIDES)}{''.join(f'{n:>10}' for n in RATIOS)}   cosine  solver"
    )
    for kind in args.kinds.split(","):
        found = {}
        for shape in args.shapes.split(","):
            line, found[shape] = row(shape, kind, args)
            print(line, flush=True)
        if ROBERTA.keys() <= found.keys():
            print(whole(kind, found), flush=True)


if __name__ == "__main__":
    main()
