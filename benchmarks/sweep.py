"""What the machinery costs per run, and whether a long sweep grows: python -m benchmarks.sweep [--cells 1000].

Overhead: claim, record and W&B (offline) of one run, apart from the run itself; the goal is under 150 ms, and under 1 % of a
run of 60 s. Growth: the resident memory of one process that runs many cells of the cheapest method (the head alone, one
step) on a tiny model. On two busy cores: 62 ms in the median (W&B 59, record 2.5, claim 0.3), 0.3 ms to skip a run that is
done; 593.9 MiB after 100 cells, 592.0 after 500, 592.1 after 1,000.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.config import compose
from bench.ledger import Claim
from bench.run import run
from bench.track import track

TINY = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:16,val:4,test:4}", "method=linear_probe"]
TINY += ["train.steps=1", "train.batch_size=4", "task.max_length=32", "wandb=off"]


def spent_ms(act: Callable[[], object], times: int) -> tuple[float, float]:
    """Best and median milliseconds of `act`, after one call that is not counted. On a busy machine the best says more."""
    act()
    spent = []
    for _ in range(times):
        begun = time.perf_counter()
        act()
        spent.append(1000 * (time.perf_counter() - begun))
    return min(spent), statistics.median(spent)


def overhead(results: Path, times: int) -> dict[str, tuple[float, float]]:
    """Milliseconds (best, median) per run of each part of the machinery, for a record with 200 logged steps."""
    record = run(compose([*TINY, f"results={results}"]))
    assert record.status == "ok", record.traceback
    record.history = [{"step": i, "train/loss": 0.5 + i, "train/lr": 1e-4 * i} for i in range(200)]

    def claim() -> None:
        with Claim(results, record.id, lease=120) as held:
            held.check()

    def tracked() -> None:
        with track("offline", record, results / record.id) as tracker:
            for row in record.history:
                tracker.log(int(row["step"] or 0), row)
            tracker.finish(record)

    done = compose([*TINY, f"results={results}"])
    parts = {"claim": claim, "record": lambda: record.save(results), "W&B offline": tracked}
    costs = {name: spent_ms(act, times) for name, act in parts.items()}
    best, median = (sum(column) for column in zip(*costs.values(), strict=True))
    return costs | {"sum": (best, median), "skip of a done run": spent_ms(lambda: run(done), times)}


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def growth(results: Path, cells: int) -> list[tuple[int, float, float]]:
    """(cells done, resident MiB, seconds per cell since the last row), ten rows."""
    rows, begun, every = [], time.perf_counter(), max(1, cells // 10)
    for seed in range(1, cells + 1):
        record = run(compose([*TINY, f"seed={seed}", f"results={results}"]))
        assert record.status == "ok", record.traceback
        if seed % every == 0:
            rows.append((seed, resident(), (time.perf_counter() - begun) / every))
            print("{:>6} cells  {:8.1f} MiB  {:.3f} s per cell".format(*rows[-1]), flush=True)
            begun = time.perf_counter()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--times", type=int, default=30, help="repetitions of each part")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, (best, median) in overhead(Path(folder), given.times).items():
            print(f"{name:20} best {best:8.1f} ms   median {median:8.1f} ms", flush=True)
        rows = growth(Path(folder), given.cells)
    print(f"from {rows[0][0]} to {rows[-1][0]} cells: {rows[-1][1] - rows[0][1]:+.1f} MiB")


if __name__ == "__main__":
    main()
