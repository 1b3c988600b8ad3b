"""python -m bench.evaluate RECORD: rebuild a finished run's model from its record and check that it predicts the same."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.config import Config, from_record
from bench.record import Record, identity

if TYPE_CHECKING:
    from torch import Tensor

    from bench.prepare import Prepared
    from tasks import Rows


def rebuild(path: Path, root: str | None = None, device: str = "cpu") -> tuple[Config, Prepared]:
    """The configuration and the trained model of a finished run, from its record and the state beside it.

    path: a record or its folder. root: another place of the data's mirror.
    Raises FileNotFoundError without the state, ValueError where the rows are no longer those of the run.
    """
    from safetensors.torch import load_file

    folder = path if path.is_dir() else path.parent
    record = Record.load(path)
    if not (folder / "state.safetensors").exists():
        raise FileNotFoundError(f"{folder} has no state.safetensors: the run is {record.status}, or save_state was off")
    config = from_record(record.config, record.config["classes"])
    config.device, config.data.root = device, root or config.data.root
    rows = config.task.load(config.data, config.seed)
    if identity(record.config, rows.source) != record.id:
        raise ValueError(
            f"the rows of {record.task} are not those of the run {record.id}: {rows.source['fingerprints']}"
        )
    return config, trained(config, rows, load_file(folder / "state.safetensors"))


def trained(config: Config, rows: Rows, state: dict[str, Tensor]) -> Prepared:
    """The model of this configuration in one process, with a finished run's trained state."""
    import torch

    from bench.model import load_trained_state
    from bench.prepare import find_device, prepare

    ready = prepare(config, rows, find_device(config))
    ready.method.finish(ready.model)
    with torch.no_grad():
        load_trained_state(ready.model, state)
    return ready


def evaluate(path: Path, root: str | None = None, device: str = "cpu") -> dict[str, float]:
    """Score val and test again: "val/...", "test/..." metrics, and "changed", the share of predictions that differ.

    Takes and raises what `rebuild` does; the predictions lie beside the record.
    """
    import pandas as pd

    folder = path if path.is_dir() else path.parent
    config, ready = rebuild(path, root, device)
    old = pd.read_parquet(folder / "predictions.parquet")
    found: dict[str, float] = {}
    changed = []
    for split in old["split"].unique():  # no test where it was locked
        new = ready.predict(split, config)
        before = old[old["split"] == split].sort_values("row_id", ignore_index=True)
        changed.append(new["prediction"].ne(before["prediction"]))
        found |= {f"{split}/{k}": v for k, v in ready.task.task_of(split).score(new).items()}
    return found | {"changed": float(pd.concat(changed).mean())}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluate", description=__doc__)
    parser.add_argument("record", type=Path, help="results/<id> or its record.json")
    parser.add_argument("--root", help="mirror folder of the data, if it is no longer where the run had it")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    found = evaluate(args.record, args.root, args.device)
    stored = Record.load(args.record).metrics
    for name, value in found.items():
        print(f"{name:28} {value:.6f}" + (f"   stored {stored[name]:.6f}" if stored.get(name) is not None else ""))
    return int(found["changed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
