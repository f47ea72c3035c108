"""Describe the machine a calibration was made on, closely enough to notice that it no longer holds.

What changes a measurement: the processor, the threads, PyTorch, our own kernels, and what is measured.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from tongyun import __version__
from tongyun.units import MIB

Description = dict[str, str | int | float | bool]

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
KERNELS = Path(__file__).parents[3] / "model" / "kernels"
METHOD = 2
"""How a calibration is taken: one more where samples come to mean something else. 2: what serving adds is
held against the price of a step."""
DECISIVE = (
    "method",
    "device",
    "processor",
    "cores",
    "engine_threads",
    "torch",
    "kernels",
    "ops",
    "weights",
    "kv",
    "activations",
    "quick",
    "replays",
)
"""A calibration is stale when one of these differs."""


def describe(device: torch.device, *, threads: int, ops: str) -> Description:
    """Processor, cores, memory, caches, versions; what could not be read is left out."""
    return {
        "method": METHOD,
        "device": device.type,
        "vendor": _vendor(device),
        "processor": _processor(device),
        "cores": psutil.cpu_count() or 1,
        "engine_threads": threads,
        "memory_bytes": memory_bytes(device),
        **_cache_sizes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tongyun": __version__,
        "ops": ops,
        "kernels": kernels_digest(),
    }


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Why a calibration made on `then` does not hold on `now`; empty when it does."""
    return [
        f"{key} was {then.get(key)}, is {now.get(key)}" for key in DECISIVE if then.get(key) != now.get(key)
    ]


class Elsewhere:
    """Cores that other processes kept busy while the `with` block ran, on average.

    Their time is what all processors were busy less what this process and its ended children took.
    """

    cores = 0.0

    def __enter__(self) -> Elsewhere:
        self._begun = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        wall_s, busy_s, own_s = (now - then for now, then in zip(self._now(), self._begun, strict=True))
        self.cores = max(0.0, busy_s - own_s) / max(wall_s, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of the clock, of all processors at work, and of ours."""
        machine, own = psutil.cpu_times(), os.times()
        resting = machine.idle + getattr(machine, "iowait", 0.0)
        # Guests are counted as users, too.
        guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)
        return time.perf_counter(), sum(machine) - resting - guests, sum(own[:4])


def kernels_digest() -> str:
    """A short digest of the sources of our kernels."""
    digest = hashlib.sha256()
    for file in sorted(KERNELS.rglob("*")):
        if file.suffix in (".py", ".cpp", ".h"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def memory_bytes(device: torch.device) -> int:
    """Memory of the device, all of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _vendor(device: torch.device) -> str:
    return "NVIDIA" if device.type == "cuda" else _cpuinfo("vendor_id") or platform.machine()


def _cpuinfo(key: str) -> str | None:
    found = re.search(rf"^{key}\s*:\s*(.+)$", CPUINFO.read_text(), re.M) if CPUINFO.exists() else None
    return found[1].strip() if found else None


def _cache_sizes() -> Description:
    sizes: Description = {}
    for entry in sorted(CACHES.glob("index*")):
        kind = (entry / "type").read_text().strip()
        size = re.fullmatch(r"(\d+)([KM])", (entry / "size").read_text().strip())
        if kind != "Instruction" and size:
            level = (entry / "level").read_text().strip()
            sizes[f"cache_l{level}_bytes"] = int(size[1]) * (1024 if size[2] == "K" else MIB)
    return sizes
