"""One run on several devices: `torchrun --nproc-per-node 2 -m bench ...`, data parallel in the one training loop.

Rank 0 is the command: it composes cells, claims them, writes records. The other ranks wait for the configurations that it
computes (`work`), and take part from `leading` to the end of that block: each takes every n-th row of a batch, the losses
are weighted as in one process, and the gradients of what is trained, which PEFT keeps few, are added up in place. After that
every rank does the same step, so that methods, optimizers and checkpoints know nothing of it. Outside that block, and
without torchrun, `size()` is 1 and nothing here does anything.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bench import collectives
from methods.base import Unsupported

if TYPE_CHECKING:
    import pandas as pd

    from bench.config import Config

T = TypeVar("T")
MARK = "TORCHELASTIC_RUN_ID"  # torchrun's; WORLD_SIZE alone may be anybody's
PATIENCE = timedelta(days=7)  # ranks wait for rank 0's data, claims and files; torchrun ends them where one dies
_team = [False]  # whether all ranks are at work on one run


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if MARK in os.environ else 1


def place() -> int:
    """This process among them; 0 is the command."""
    return int(os.environ["RANK"]) if MARK in os.environ else 0


def size() -> int:
    """How many ranks share the run that this process computes."""
    return launched() if _team[0] else 1


def rank() -> int:
    """This process among them."""
    return place() if _team[0] else 0


@contextmanager
def ranks() -> Iterator[None]:
    """Join torchrun's processes inside the block; at its end rank 0 sends the others home. Nothing without torchrun."""
    if launched() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        if dist.is_initialized():
            if place() == 0:
                collectives.tell(None)
            dist.destroy_process_group()


def work(follow: Callable[[dict[str, Any]], None]) -> None:
    """What every rank but 0 does: `follow` each configuration that rank 0 computes. Raises what the others do not know of."""
    while (job := collectives.tell(None)) is not None:
        try:
            follow(job)
        except Exception as error:
            if not getattr(error, "agreed", False):
                raise


@contextmanager
def leading(config: Config, values: dict[str, Any]) -> Iterator[None]:
    """The part of a run that all ranks compute; `values` is the configuration as the record keeps it.

    Where rank 0 fails alone, the group ends, and torchrun with it. Raises ValueError for what one process alone can do: a
    failure, and not `skipped`, so that the cell is run where it is asked for without torchrun.
    """
    if launched() == 1:
        if config.shard:
            raise ValueError(
                "shard=true shares weights out over the processes of torchrun, and this is one: start it by that"
            )
        yield
        return
    _refuse(config)
    if place() == 0:
        collectives.tell(values)
    _team[0] = True
    try:
        yield
    except BaseException as error:
        if place() == 0 and not getattr(error, "agreed", False):
            dist.destroy_process_group()
        raise
    finally:
        _team[0] = False


def _refuse(config: Config) -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            "torchrun computes one run after another in its own processes: leave out hydra/launcher and isolate=true"
        )
    if config.train.features != "off":
        raise ValueError("train.features keeps the rows of one process: use train.features=off with torchrun")
    if config.shard and config.spectra_every:
        raise ValueError(
            "spectra_every looks at whole weights, which no process has under shard=true: leave one of them out"
        )
    if not config.method.parallel:
        raise ValueError(
            "the method sums over the rows of one process what cannot be summed over several: leave out torchrun"
        )


def share(items: Sequence[T]) -> list[T]:
    """Every n-th of `items`: what this rank takes."""
    return list(items[rank() :: size()])


@contextmanager
def together() -> Iterator[None]:
    """Where the block fails on one rank it fails on all: there with its error, elsewhere with one of the same kind."""
    if size() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if getattr(error, "agreed", False):  # by a block inside this one
            raise
        own = error
    if not total(own is not None):
        return
    said = collectives.gather(json.dumps(own and [type(own).__name__, str(own)]).encode())
    errors = [(k, *error) for k, error in enumerate(map(json.loads, said)) if error]
    raised = own or _alike(*errors[0])
    raised.agreed = True  # type: ignore[attr-defined]
    raise raised


def _alike(rank: int, name: str, text: str) -> Exception:
    from bench.train import Claimed, Diverged, Interrupted

    known: Any = (Unsupported, Interrupted, Diverged, Claimed, FloatingPointError, MemoryError, torch.OutOfMemoryError)
    return {kind.__name__: kind for kind in known}.get(name, RuntimeError)(f"rank {rank}: {text}")


@contextmanager
def own_draws(step: int) -> Iterator[None]:
    """Each rank's own dropout inside the block; the generators that methods draw from stay the same on all."""
    if size() == 1:
        yield
        return
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed((torch.initial_seed() * 1_000_003 + step * size() + rank()) % 2**63)
        yield


def total(count: int) -> int:
    """The sum of a count over all ranks."""
    if size() == 1:
        return count
    value = torch.tensor(count)
    dist.all_reduce(value)
    return int(value)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all ranks, in single precision at least."""
    if size() == 1:
        return
    collectives.add_up(tensors)


def add_up_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Gradients over all rows of the batch: zero where a rank had none, and none where no rank had any."""
    if size() == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
    dist.all_reduce(has)
    reached = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
    for p in reached:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    add_up([p.grad for p in reached if p.grad is not None])


def gathered(table: pd.DataFrame | None) -> pd.DataFrame:
    """The rows of all ranks' tables; None for a rank that had no row."""
    import pandas as pd

    if size() == 1:
        assert table is not None
        return table
    file = io.BytesIO()
    if table is not None:
        table.to_parquet(file, index=False)
    return pd.concat(
        [pd.read_parquet(io.BytesIO(part)) for part in collectives.gather(file.getvalue()) if part], ignore_index=True
    )


def mark(record: Any) -> None:
    """Say in a record that its costs are those of several devices, so that no table has them beside those of one."""
    if size() == 1:
        return
    shared = ", sharded" if record.config["shard"] else ""
    record.environment |= {"device": f"{size()} x {record.environment['device']}{shared}", "devices": size()}
    peaks = [json.loads(part) for part in collectives.gather(json.dumps(record.memory.get("peak")).encode())]
    record.memory |= {f"peak_rank_{k}": peak for k, peak in enumerate(peaks)}
    record.memory["peak"] = max((p for p in peaks if p is not None), default=None)


def check_alike(parameters: Iterable[Tensor]) -> None:
    """Raise RuntimeError unless all ranks have trained the same parameters."""
    if size() == 1:
        return
    sums = json.dumps([float(p.detach().double().sum()) for p in parameters])
    if len(set(collectives.gather(sums.encode()))) > 1:
        raise RuntimeError(f"after training the parameters of the {size()} ranks differ; run it in one process")
