"""One run of the grid, top to bottom: from a configuration to a record."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import distributed, fused, measure
from bench.batches import TrainBatches, elements, longest
from bench.config import Config, from_record
from bench.isolate import in_a_process, isolated
from bench.ledger import Claim, Claimed
from bench.model import counts, trained_state
from bench.prepare import Prepared, find_device, prepare, seed_everything
from bench.record import PART, Record, identity, replacing
from bench.rows import load
from bench.selection import unlock
from bench.session import Costs, Session
from bench.track import Tracker, track
from bench.train import Diverged, Interrupted, Loop, Stop, stoppable, to_device
from methods.base import Unsupported

if TYPE_CHECKING:
    import pandas as pd

    from tasks import Rows

log = logging.getLogger("bench")
DONE = ("ok", "skipped", "oom", "diverged")  # failed and interrupted runs are taken up again


def run(config: Config, *, since: float | None = None) -> Record:
    """Run one cell, or return its record where it is done already. Never raises for what can go wrong inside a run.

    A failure becomes a status with a reason (and a traceback) in the saved record. A stopped run keeps its checkpoint;
    the same configuration goes on from there. Where another worker computes the cell, the status is "running" and nothing
    is saved. since: file time of the command's start; what failed later than that is not tried again.
    """
    record = _new_record(config)
    results = Path(config.results)
    try:
        rows = load(config)
        record.data, record.id = rows.source, identity(record.config, rows.source)
        record.task += " (stand-in)" if rows.source["standin"] else ""
        if (done := _done(record, config, since)) is not None:
            return done
        if isolated(config):
            return in_a_process(config, record, since)
        with Claim(results, record.id, lease=config.lease, cell=record.cell, began=since) as claim:
            return _done(record, config, since) or _claimed(record, config, rows, claim)
    except Claimed as other:
        record.status, record.reason = "running", str(other)
        return record
    except Exception as error:  # the data, the tracker or the disk: nothing of the run itself
        record.status, record.reason, record.traceback = "failed", _sentence(error), traceback.format_exc()
    return save(record, results)


def follow(values: dict[str, Any], stop: Stop) -> None:
    """What the other ranks of torchrun do of the run that rank 0 computes and keeps. Raises what stops it."""
    config = from_record(values, values["classes"])
    record = _new_record(config)
    rows = load(config)
    record.data, record.id = rows.source, identity(record.config, rows.source)
    _run(record, config, rows, Tracker(), stop)


def save(record: Record, results: Path) -> Record:
    """Save a failure; where even that cannot be written, log it, and go on with the next cell."""
    try:
        record.save(results)
    except OSError as error:
        log.error("%s %s could not be saved: %s", record.id, record.status, _sentence(error))
    return record


def _claimed(record: Record, config: Config, rows: Rows, claim: Claim) -> Record:
    """Run the cell whose claim is ours."""
    folder = Path(config.results) / record.id
    if config.force:
        shutil.rmtree(folder, ignore_errors=True)
    for part in folder.glob(f".*{PART}"):  # of a killed process
        part.unlink(missing_ok=True)
    with stoppable(claim) as stop, track(config.wandb, record, folder, project=config.wandb_project) as tracker:
        _statuses(record, lambda: _run(record, config, rows, tracker, stop))
        claim.check()
        record.save(Path(config.results))
        tracker.finish(record)
    return record


def _statuses(record: Record, body: Any) -> None:
    """Run `body`; turn what it raises into a status."""
    try:
        body()
        return
    except Unsupported as error:
        record.status, record.reason = "skipped", str(error)
        return
    except Interrupted as error:
        record.status, record.reason = "interrupted", str(error)
        return
    except (KeyboardInterrupt, Claimed):
        raise
    except Exception as error:
        record.reason, record.traceback = _sentence(error), traceback.format_exc()
        diverged = isinstance(error, (Diverged, FloatingPointError))
        record.status = "oom" if measure.out_of_memory(error) else "diverged" if diverged else "failed"
    if record.status == "oom":  # free what the failed run holds before the next one starts
        torch.cuda.empty_cache() if torch.cuda.is_available() else None


def _run(record: Record, config: Config, rows: Rows, tracker: Tracker, stop: Stop) -> None:
    unlock(config, rows)
    device = find_device(config)
    record.environment = measure.environment(device)
    costs = Costs(device)
    with costs.peak_of_failure(record):
        with distributed.leading(config, record.config):
            with costs.phases("setup"), distributed.together():
                ready = prepare(config, rows, device)
                batches = ready.train_batches(config)
                record.model_source = ready.source
                loop = Loop(ready.model, ready.method, config.train, steps=_steps(config, batches), device=device)
                vars(record).update(counts(ready.model, ready.head))
                cost = _probe(ready, loop, config)
            seed_everything(config.seed)
            session = Session(record, config, ready, loop, costs, tracker, stop)
            session.resume()
            with fused.joined(ready, config, costs.phases):
                scored = session.go(batches, cost)
            state = trained_state(ready.model)
        if distributed.place():
            return
        kept = counts(ready.model, ready.head)  # after training less may be left: a dropped MLP, pruned ranks
        record.stored_params, record.stored_bytes = kept["stored_params"], kept["stored_bytes"]
        record.metrics = {f"{split}/{k}": v for split, (_, metrics) in scored.items() for k, v in metrics.items()}
        record.metrics |= {f"last_val/{k}": v for k, v in loop.progress.last_metrics.items()}
        record.steps, record.metric = loop.progress.step, ready.task.metric
        record.score = record.metrics.get(f"test/{ready.task.metric}")  # none while the test split is locked
        record.time = measure.times(costs.phases, costs.steps)
        record.energy = costs.energy.read() if distributed.launched() == 1 else {}  # one counter sees one device
        measure.mark_cached(record, costs.phases)
        measure.mark_fused(record, costs.phases)
        record.flops = _flops(cost, loop, batches, config)
        record.data["truncated"] = {split: encoded.truncated for split, encoded in ready.encoded.items()}
        stop.owned()
        save_results(session.folder, {split: table for split, (table, _) in scored.items()}, state, config)
        if config.spectra or config.forgetting:
            _look_inside(record, config, rows, ready, state)
        session.checkpoint.unlink(missing_ok=True)


def _look_inside(record: Record, config: Config, rows: Rows, ready: Prepared, state: dict[str, torch.Tensor]) -> None:
    """What the training did to the weights and to what they knew; of shared-out weights on a model rebuilt in the machine's memory."""
    model = ready.model
    if config.shard:
        from bench.evaluate import trained

        model = trained(dataclasses.replace(config, device="cpu"), rows, state).model
    if config.spectra:
        from analysis.spectra_runs import of_run

        record.spectra = of_run(model, config, Path(config.results) / record.id)
    if config.forgetting:
        from analysis import forgetting

        record.forgetting = forgetting.of_run(model, config)


def save_results(folder: Path, tables: dict[str, pd.DataFrame], state: dict[str, torch.Tensor], config: Config) -> None:
    """Write the predictions of val and test, and the trained state, beside the record."""
    import pandas as pd
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    table = pd.concat([p.assign(split=split) for split, p in tables.items()], ignore_index=True)
    with replacing(folder / "predictions.parquet") as part:
        table.to_parquet(part, index=False)
    if config.save_state:
        with replacing(folder / "state.safetensors") as part:
            save_file({n: t.cpu().contiguous() for n, t in state.items()}, str(part))


def _new_record(config: Config) -> Record:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    plain["classes"] = {
        "method": type(config.method).__module__.rpartition(".")[2],
        "task": type(config.task).__module__.rpartition(".")[2],
    }
    names = config.choices
    return Record(
        id=identity(plain, {}),
        method=names.get("method", plain["classes"]["method"]),
        model=names.get("model", config.model.path),
        task=names.get("task", config.task.path),
        seed=config.seed,
        config=plain,
        experiment=config.name,
    )


def _done(record: Record, config: Config, since: float | None) -> Record | None:
    """The record of this cell where it needs no run: done before, or by another worker since this command started."""
    path = Path(config.results) / record.id / "record.json"
    if not path.exists():
        return None
    old = Record.load(path)
    fresh = since is not None and path.stat().st_mtime >= since and old.status != "interrupted"
    if not fresh and (config.force or old.status not in DONE):
        return None
    log.info("%s is done already (%s): %s", old.id, old.status, path)
    return old


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _steps(config: Config, batches: TrainBatches) -> int:
    cfg = config.train
    if config.method.untrained:
        return 0
    return cfg.steps if cfg.steps is not None else max(1, round((cfg.epochs or 0) * batches.per_epoch))


def _probe(ready: Prepared, loop: Loop, config: Config) -> dict[str, int]:
    """What a device's micro-batch of the longest rows costs; its `size` scales the whole training's FLOPs."""
    devices = distributed.size()
    size = -(-config.train.batch_size // config.train.accumulate // devices)
    batch = to_device(longest(ready.encoded["train"], size), loop.device)
    cost = measure.probe(ready.model, batch, loop.loss, backward=ready.method.backward, offload=config.train.offload)
    return cost | {"size": elements(batch, packed=ready.packed), "devices": devices, "packed": ready.packed}


def _flops(cost: dict[str, int], loop: Loop, batches: TrainBatches, config: Config) -> dict[str, int | None]:
    """FLOPs of a training step and of a forward on the longest rows; of the whole training in proportion to its tokens."""
    seen = sum(batches.elements(step, packed=bool(cost["packed"])) for step in range(loop.progress.step))
    return {
        "train_step": cost["train_step"] * config.train.accumulate * cost["devices"] if loop.steps else 0,
        "forward": cost["forward"] * cost["devices"],
        "total_train": round(cost["train_step"] * seen / cost["size"]),
    }
