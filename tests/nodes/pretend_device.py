"""A second device on any machine: PyTorch sees an accelerator, the CPU does the work.

Its memory is counted, and a tensor on the wrong side fails as it would on a GPU, so what leaves
the compute device, and what comes back, can be tested without one. Needs a C++ compiler and ninja.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

NAME = "pretend"


def build():
    """Compile and register the device; returns the counters ``allocated``, ``peak`` in bytes."""
    from torch.utils.cpp_extension import load

    source = Path(__file__).with_suffix(".cpp")
    counters = load("ldcp_pretend_device", [str(source)], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    runtime = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module(NAME, runtime)
    return counters
