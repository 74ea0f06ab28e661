"""What a figure was measured on: hardware, versions, and the memory in use."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "numpy")
#: glibc's allocator gives blocks above 32 MB back at once, unless this is set before the start
MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, system and versions, as strings and numbers."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "malloc_mmap_threshold": os.environ.get(MMAP_THRESHOLD),
    }


def with_memory(evaluate: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """The result of ``evaluate`` and bytes in use: on CUDA its peak, else the process after it.

    The bytes are None where neither psutil nor /proc can tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result = evaluate()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device)
    return evaluate(), resident_bytes()


def resident_bytes() -> int | None:
    """Resident size of this process, from psutil or /proc."""
    try:
        import psutil

        return psutil.Process().memory_info().rss
    except ImportError:
        pass
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
