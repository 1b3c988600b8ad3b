"""Where a run happened: versions, device, threads, commit; and the energy that its GPU drew.

Nothing here names the host, the user or a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from bench import matmul

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy", "peft")


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """The record's `environment`; `device` is the one trained on, by default the GPU where there is one.

    `memory` says how the headline memory is taken ("cuda_allocator" or "counted"). `fingerprint` is a hash over what can
    change numbers: versions, kind of device, threads, instruction set, deterministic flags.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    software = {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "platform": f"{platform.system()}-{platform.machine()}",
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **_flags(),
    }
    hardware = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "driver": _driver() if cuda else None,
    }
    memory = {"memory": "cuda_allocator" if cuda else "counted"}
    fingerprint = hashlib.sha256(json.dumps(software, sort_keys=True).encode()).hexdigest()[:10]
    return {**software, **hardware, **memory, **_commit(), "fingerprint": fingerprint}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _flags() -> dict[str, Any]:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "matmul": matmul.used(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


@cache
def _commit() -> dict[str, Any]:
    """The project's commit and whether tracked files differ from it; nulls where it does not run from its own checkout.

    Asked once per process, when its code has just been imported.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:  # installed inside somebody else's checkout
            return {"commit": None, "dirty": None}
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text()) if file.exists() else None
    return found[1] if found else None


class Energy:
    """Joules that the GPU drew: `with energy: ...`, then `read()`. Needs an NVIDIA GPU and `nvidia-ml-py`.

    Reads NVML's counter, which is of the whole GPU: other processes on it count too. Where there is none (no GPU, no
    package, a MIG slice) `read()` is empty. Used without `with`, it counts from its making.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._nvml, self._handle = _nvml(torch.device(device))
        self._before = 0.0  # of the processes that this run resumes
        self._start = self._millijoules()

    def __enter__(self) -> Self:
        self._start = self._millijoules()
        return self

    def __exit__(self, *_: object) -> None:
        joules = self.read().get("gpu_joules")
        self._before, self._start = joules or self._before, None

    def read(self) -> dict[str, float | None]:
        """`{"gpu_joules": ...}`, or nothing where it cannot be known."""
        if self._handle is None:
            return {}
        now = self._millijoules() if self._start is not None else None
        since = (now - self._start) / 1000 if now is not None and self._start is not None else 0.0
        return {"gpu_joules": self._before + since}

    def state(self) -> dict[str, float | None]:
        """Plain JSON for `load_state`."""
        return self.read()

    def load_state(self, state: dict[str, float | None]) -> None:
        self._before += state.get("gpu_joules") or 0.0

    def _millijoules(self) -> int | None:
        if self._handle is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:  # not supported here
            self._handle = None
            return None


def _nvml(device: torch.device) -> tuple[Any, Any]:
    """NVML and its handle of `device`, found by UUID since CUDA_VISIBLE_DEVICES renumbers; (None, None) without."""
    if device.type != "cuda":
        return None, None
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (pynvml.NVMLError, AttributeError):
        return None, None
