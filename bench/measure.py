"""What a run costs: seconds and peak bytes by phase, bytes by kind, FLOPs, energy.

On a CUDA device the headline is the allocator's peak while training. On a CPU nothing counts allocations, so the bytes are
counted by kind instead: exact, the same on every machine, and without what a kernel takes for itself.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from bench.clock import Phases, StepTimer, times
from bench.environment import Energy, environment
from bench.flops import counting, flops
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
FUSED = "seconds: a run's own, and an equal share of what was computed at once; bytes: by kind, of its own model"

if TYPE_CHECKING:
    from bench.record import Record


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of the loss returned by `run()`; see `_forward`."""
    return _forward(model, run)[1]


def _forward(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The loss of `run()`, and the bytes that autograd keeps for its backward.

    Distinct storages alive at the end of the forward, each counted once and whole; those of the model's parameters and
    buffers are not counted. What a custom function keeps outside `save_for_backward` is not seen. Under gradient
    checkpointing this is what is kept between forward and backward, not what the recomputation needs.
    """
    own = {s._cdata for t in model_tensors(model) for s in storages(t)}
    kept: dict[int, StorageWeakRef] = {}

    def pack(tensor: Tensor) -> Tensor:
        for s in storages(tensor):
            if s._cdata not in own:
                kept[s._cdata] = StorageWeakRef(s)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    return loss, sum(_size(reference) for reference in kept.values() if not reference.expired())


def _size(reference: StorageWeakRef) -> int:
    """Bytes of a living storage at this moment: none of a sharded weight that was whole during the forward alone."""
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata).nbytes()


def probe(model: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor], *, backward: bool = True) -> dict[str, int]:
    """FLOPs and activations of one batch: `forward` (the loss), `train_step` (with its backward), `activations`.

    One pass. Leaves no trace: parameters, gradients, buffers, modes and random states are as before, and optimizer hooks on
    gradients do not fire. `backward=False` is for methods that only ever call the loss: their step is a forward.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    activations = 0
    with untouched(model):
        train_mode(model)
        with counting() as counter:
            if backward:
                value, activations = _forward(model, lambda: loss(batch))
            else:
                with torch.no_grad():
                    loss(batch)
            forward = int(counter.get_total_flops())
            if backward:
                torch.autograd.grad(value, trained, allow_unused=True)
        return {"train_step": int(counter.get_total_flops()), "forward": forward, "activations": activations}


def memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    phases: Phases,
    *,
    activations: int,
    backward: bool = True,
) -> dict[str, int | None]:
    """The record's `memory` in bytes, to be called after training. `peak` is the headline (see the module's docstring)."""
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
    """Whether an error says that the GPU's or the machine's memory is used up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
