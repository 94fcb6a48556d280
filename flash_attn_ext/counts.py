"""What became of the calls that come through an integration: one set of counts for each, by name."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stats:
    """Calls since an integration was switched on; str() of it reads well."""

    attended: int
    """Calls that ran here."""
    returned: dict[str, int]
    """Calls that went back to torch, by reason."""
    kernels: int
    """Calls of torch's flash kernels, forward and backward, that ran here, having come another way than by name."""
    traced: int
    """Calls that torch.compile or torch.export traced; how often such graphs run is not known here."""

    def __str__(self) -> str:
        ran = f"{self.attended} calls ran here, {self.traced} were compiled, {self.kernels} came as kernels"
        return "\n".join([ran, *(f"{count} went back to torch: {reason}" for reason, count in self.returned.items())])


_lock = threading.Lock()  # calls come from several threads, autograd's among them
_counts: dict[str, Counter[str]] = {}
_returned: dict[str, Counter[str]] = {}
_counting: set[str] = set()


def start(name: str) -> None:
    """Counts from 0 on; goes on counting where it does already."""
    with _lock:
        if name not in _counting:
            _counts[name], _returned[name] = Counter(), Counter()
            _counting.add(name)


def stop(name: str) -> None:
    """Counts no more; `stats` keeps what there is."""
    with _lock:
        _counting.discard(name)


def stats(name: str) -> Stats:
    with _lock:
        counts, returned = _counts.get(name, Counter()), _returned.get(name, Counter())
        return Stats(counts["attended"], dict(returned), counts["kernels"], counts["traced"])


def count(name: str, reason: str | None = None) -> None:
    """One call: it ran here, or went back for a reason. While torch.compile traces, nothing of this is in the graph."""
    if torch.compiler.is_compiling():
        from . import tracing

        tracing.count(name, reason)
    else:
        add(name, "attended", reason)


def add(name: str, what: str, reason: str | None = None) -> None:
    """To the field `what` of Stats, or to `returned` where there is a reason. Nothing while `name` is not counting."""
    with _lock:
        if name not in _counting:
            return
        if reason is None:
            _counts[name][what] += 1
        else:
            _returned[name][reason] += 1
