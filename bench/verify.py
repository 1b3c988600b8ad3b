"""python -m bench.verify RUNS --sample 5: re-run some records from their stored configuration alone, and compare.

Where machine and software are those of the record, a run on a CPU must give the same numbers to the last bit: rows, scores
and every prediction. Elsewhere a score may differ by `--tolerance`, and a share of the predictions by `--changed`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.record import Record

TOLERANCE = 0.02  # of a score between 0 and 1, elsewhere than where the record was made
CHANGED = 0.05  # share of predictions
COLUMNS = ("record", "method", "model", "task", "seed", "policy", "data", "stored", "again", "changed", "verdict")


@dataclass
class Check:
    """One record against its repetition."""

    record: Record
    again: Record
    policy: str  # exact, or tolerance
    data: bool  # the same rows
    changed: float | None  # share of predictions that differ
    problem: str  # empty where the repetition matches


def verify(path: Path, tolerance: float = TOLERANCE, changed: float = CHANGED, device: str = "auto") -> Check:
    """Run the record of `path` (its folder) again in a temporary folder and compare."""
    from bench.config import from_record
    from bench.run import run

    old = Record.load(path)
    config = from_record(old.config, old.config["classes"])
    with tempfile.TemporaryDirectory() as folder:
        config.results, config.wandb, config.force, config.save_state = folder, "off", True, False
        config.device = device
        config.test = "locked" if config.test == "locked" else "open"  # the choice was made then
        new = run(config)
        share = _changed(path, Path(folder) / new.id)
    same_rows = old.data.get("fingerprints") == new.data.get("fingerprints")
    policy = "exact" if _same_machine(old, new) else "tolerance"
    limits = (0.0, 0.0) if policy == "exact" else (tolerance, changed)
    return Check(old, new, policy, same_rows, share, _problem(old, new, share, limits) if same_rows else "other rows")


def _problem(old: Record, new: Record, share: float | None, limits: tuple[float, float]) -> str:
    if new.status != old.status:
        return f"{new.status}: {new.reason}"
    for name, value in old.metrics.items():
        again = new.metrics.get(name)
        if value is not None and (again is None or abs(again - value) > limits[0]):
            return f"{name} {again} instead of {value}"
    if old.status == "ok" and (share is None or share > limits[1]):
        return "no predictions to compare" if share is None else f"{share:.1%} of the predictions differ"
    return ""


def _changed(old: Path, new: Path) -> float | None:
    """The share of rows of val and test whose prediction differs; None where one has no predictions."""
    import pandas as pd

    tables = [folder / "predictions.parquet" for folder in (old, new)]
    if not all(t.exists() for t in tables):
        return None
    a, b = (pd.read_parquet(t).set_index(["split", "row_id"])["prediction"] for t in tables)
    if set(a.index) != set(b.index):
        return 1.0
    return float(a.ne(b.reindex(a.index)).mean())


def _same_machine(old: Record, new: Record) -> bool:
    """Whether both runs were on the same kind of CPU with the same software, so that they must agree to the last bit."""
    a, b = old.environment, new.environment
    return all(a.get(k) == b.get(k) for k in ("fingerprint", "cpu")) and a.get("device") == "cpu"


def sample(folder: Path, size: int | None, seed: int) -> list[Path]:
    """The folders of `size` records that ended well, drawn by `seed`; all where null or fewer."""
    found = []
    for path in sorted(folder.glob("**/record.json")):
        try:
            if Record.load(path).status == "ok":
                found.append(path.parent)
        except (ValueError, TypeError) as error:
            print(f"left out: {path} ({error})", file=sys.stderr)
    return found if size is None or size >= len(found) else sorted(random.Random(seed).sample(found, size))


def row(check: Check) -> tuple[str, ...]:
    """One line of the table."""
    r, share = check.record, check.changed
    scores = ("-" if x.score is None else f"{x.score:.6f}" for x in (r, check.again))
    ends = ("-" if share is None else f"{share:.1%}", check.problem or "match")
    data = "same" if check.data else "other"
    return (r.id, r.method, r.model, r.task, str(r.seed), check.policy, data, *scores, *ends)


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.verify", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--sample", type=int, help="so many records, drawn at random; all without it")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default %(default)s")
    parser.add_argument("--changed", type=float, default=CHANGED, help="default %(default)s")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    folders = sample(args.runs, args.sample, args.seed)
    if not folders:
        print(f"error: {args.runs} holds no record with status ok", file=sys.stderr)
        return 2
    checks = [verify(f, args.tolerance, args.changed, args.device) for f in folders]
    from bench.table import aligned

    print(aligned([COLUMNS, *map(row, checks)]))
    good = sum(not c.problem for c in checks)
    print(
        f"{good} of {len(checks)} match; exact: to the last bit; tolerance: scores within {args.tolerance}, predictions {args.changed:.0%}"
    )
    return int(good < len(checks))


if __name__ == "__main__":
    sys.exit(main())
