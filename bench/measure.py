"""What a run costs: seconds and peak bytes by phase, bytes by kind, FLOPs, energy.

On a CUDA device the headline is the allocator's peak while training. On a CPU nothing counts allocations, so the bytes are
counted by kind instead: exact, the same on every machine, and without what a kernel takes for itself.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from bench.clock import Phases, StepTimer, times
from bench.environment import Energy, environment
from bench.flops import counting, flops
from bench.live import Live
from bench.offload import Offload, View
from bench.parts import parted
from bench.prefix import train_mode
from bench.storage import gradient_bytes, model_tensors, optimizer_bytes, storages, weight_bytes
from bench.untouched import untouched

__all__ = [
    "Energy",
    "Phases",
    "StepTimer",
    "environment",
    "flops",
    "gradient_bytes",
    "memory",
    "optimizer_bytes",
    "probe",
    "saved_bytes",
    "times",
    "weight_bytes",
]
Batch = dict[str, Tensor]
CACHED = ("step", "step_samples", "train", "eval", "total")  # seconds that kept features make fewer, or others share
PEAKS = ("peak", "peak_train", "peak_eval")
_USED_UP = re.compile(
    r"(CUDA|HIP) error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|(can't|cannot) allocate memory|not enough memory: you tried",
    re.I,
)
FUSED = "seconds: a run's own, and an equal share of what was computed at once; bytes: by kind, of its own model"

if TYPE_CHECKING:
    from bench.record import Record


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of the loss returned by `run()`; see `_forward`."""
    return _forward(model, run)[1]


def _forward(
    model: nn.Module, run: Callable[[], Tensor], away: Offload | None = None, live: Live | None = None
) -> tuple[Tensor, int, int]:
    """The loss of `run()`, and the bytes that autograd keeps for its backward: here, and those that `away` keeps for it.

    Distinct storages alive at the end of the forward, each counted once and whole; those of the model's parameters and
    buffers are not counted. What a custom function keeps outside `save_for_backward` is not seen. Under gradient
    checkpointing this is what is kept between forward and backward, not what the recomputation needs.
    """
    own = {s._cdata for t in model_tensors(model) for s in storages(t)}
    here: dict[int, StorageWeakRef] = {}
    there: dict[int, StorageWeakRef] = {}

    def pack(tensor: Tensor) -> Tensor | View:
        with live.aside() if live else nullcontext():
            packed = tensor if away is None else away.pack(tensor)
        kept, place = (packed.copy.bytes, there) if isinstance(packed, View) else (packed, here)
        place |= {s._cdata: StorageWeakRef(s) for s in storages(kept) if s._cdata not in own}
        return packed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, Offload.unpack):
        loss = run()
    return loss, _living(here), _living(there)


def _living(references: dict[int, StorageWeakRef]) -> int:
    """Bytes of storages that are still there: none of a sharded weight that was whole during the forward alone."""
    found = (torch.UntypedStorage._new_with_weak_ptr(r.cdata) for r in references.values() if not r.expired())
    return sum(storage.nbytes() for storage in found)


def probe(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Batch], Tensor],
    *,
    backward: bool = True,
    offload: str = "none",
    live: Live | None = None,
) -> dict[str, int]:
    """FLOPs of one batch, `forward` (the loss) and `train_step` (with its backward); bytes kept between: `activations`.

    offload: as `train.offload`; the bytes that it keeps in the host's memory are `offloaded`, and no part of `activations`.
    live: is active meanwhile, and has the most bytes at once afterwards.

    One pass. Leaves no trace: parameters, gradients, buffers, modes and random states are as before, and optimizer hooks on
    gradients do not fire. `backward=False` is for methods that only ever call the loss: their step is a forward.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    activations = offloaded = 0
    away = None if offload == "none" else Offload(model)
    with untouched(model), live or nullcontext():
        train_mode(model)
        with counting() as counter:
            if backward:
                value, activations, offloaded = _forward(model, lambda: loss(batch), away, live)
            else:
                with torch.no_grad():
                    loss(batch)
            forward = int(counter.get_total_flops())
            if backward:
                if any(map(parted, trained)):  # their gradients come by hooks of their modules
                    value.backward()
                else:
                    torch.autograd.grad(value, trained, allow_unused=True)
        kept = {"activations": activations} | ({"offloaded": offloaded} if away else {})
        return {"train_step": int(counter.get_total_flops()), "forward": forward} | kept


def memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    phases: Phases,
    *,
    activations: int,
    offloaded: int | None = None,
    backward: bool = True,
) -> dict[str, int | None]:
    """The record's `memory` in bytes, to be called after training. `peak` is the headline (see the module's docstring).

    `offloaded`, where the run does so, lies in the host's memory, and is no part of the headline.
    """
    kinds: dict[str, int | None] = {
        "weights": weight_bytes(model),
        "gradients": gradient_bytes(model) if backward else 0,
        "optimizer": optimizer_bytes(optimizer),
        "activations": activations,
    }
    peaks = {f"peak_{name}": phases.peaks.get(name) for name in ("train", "eval", "generation", "setup")}
    counted = sum(v for v in kinds.values() if v is not None)
    return {
        **kinds,
        **peaks,
        **({} if offloaded is None else {"offloaded": offloaded}),
        "peak": peaks["peak_train"] if phases.device.type == "cuda" else counted,
    }


def peaks(phases: Phases) -> dict[str, int | None]:
    """Of a run that ended early, in bytes: the allocator's peaks by phase on a GPU; else the whole process's resident peak."""
    if phases.device.type != "cuda":
        unit = 1024 if sys.platform == "linux" else 1
        return {"peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    named = {f"peak_{name}": phases.peaks.get(name) for name in ("train", "eval", "generation", "setup")}
    return {**named, "peak": max((p for p in named.values() if p is not None), default=None)}


def mark_cached(record: Record, phases: Phases) -> None:
    """Where features were kept: move what that made cheaper out of the columns that tables and figures read, to `cached_...`.

    What stays was taken without them: FLOPs, and bytes of weights, gradients, optimizer and activations. `time.features` are
    the seconds it took to compute them, or to read them where they were there.
    """
    record.time["features"] = phases.seconds.get("features")
    if record.time["features"] is not None:
        _set_aside(record, "cached", CACHED, PEAKS if phases.device.type == "cuda" else ())


def mark_fused(record: Record, phases: Phases) -> None:
    """Where runs were trained at once: say how many, and move what is a share of theirs out of those columns, to `fused_...`.

    What stays is the run's own: FLOPs, and bytes of weights, gradients, optimizer and activations.
    """
    if phases.fused > 1:
        record.environment["fused"] = {"runs": phases.fused, "rule": FUSED}
        _set_aside(record, "fused", (*CACHED, "setup", "generation"), PEAKS)


def _set_aside(record: Record, why: str, seconds: tuple[str, ...], peaks: tuple[str, ...]) -> None:
    costs: Any = ((record.time, seconds), (record.memory, peaks), (record.energy, tuple(record.energy)))
    for values, names in costs:
        for name in names:
            values[f"{why}_{name}"], values[name] = values.get(name), None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU's or the machine's memory is used up.

    torch has a type for the GPU's own allocator alone. A failed page-locked allocation is a CUDA error like any other
    (CachingHostAllocator.cpp), one of plain memory a RuntimeError (alloc_cpu.cpp; other words on Windows).
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _USED_UP.search(str(error)) is not None
