"""Peak memory of a piece of code, as the system counted it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def _status_bytes(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024.0
    return math.nan


class PeakMemory:
    """Context manager; afterwards ``bytes`` holds the most memory in use inside, beyond what was in use at its start.

    On a GPU torch's allocator counts. On Linux the kernel does (VmHWM, reset through /proc/self/clear_refs), after the
    C library has given freed memory back, which would otherwise be reused without being counted. Elsewhere ``bytes``
    is NaN.
    """

    bytes: float = math.nan

    def __init__(self, device: torch.device | str):
        self._cuda = torch.device(device).type == "cuda"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start: float = torch.cuda.memory_allocated()
        elif _STATUS.exists():
            malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
            if malloc_trim is not None:
                malloc_trim(0)
            with contextlib.suppress(OSError):  # where it is not permitted, the peak so far is an upper bound
                Path("/proc/self/clear_refs").write_text("5")
            self._start = _status_bytes("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        elif _STATUS.exists():
            self.bytes = _status_bytes("VmHWM") - self._start
