"""What glibc does with memory that PyTorch frees on a CPU; elsewhere these do nothing.

By default glibc hands large freed blocks straight back to the system, which fills the next ones
with zeros page by page: a tenth of a step of the demo model. A loop that needs the same memory
again in every step had better keep it.
"""

from __future__ import annotations

import ctypes
import gc
import os

#: parameters of mallopt(3): blocks from this size are mapped on their own; so much may lie free
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LARGEST = 2**31 - 1


def give_back_memory() -> None:
    """Return what was freed so far to the system."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass


def keep_freed_memory() -> bool:
    """From now on keep what is freed, for what is needed next. Whether that could be arranged.

    An environment that sets these thresholds itself is left as it is.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(name, LARGEST) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
