"""What a figure was measured on: hardware, versions, and the memory in use."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
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
        "packages": {name: version(name) for name in PACKAGES},
        "malloc_mmap_threshold": os.environ.get(MMAP_THRESHOLD),
    }


def with_memory(evaluate: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """The result of ``evaluate`` and bytes in use: on CUDA its peak, else the process after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result = evaluate()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device)
    return evaluate(), psutil.Process().memory_info().rss


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
