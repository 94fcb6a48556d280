"""Our attention inside other packages. Nothing is changed on import, and a module imported when it is first named."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from ..counts import Stats

# Each has active(), and stats() if calls come through it that would otherwise go elsewhere.
_PARTS = ("integrations.sdpa", "integrations.modules", "integrations.transformers", "integrations.dtensor", "shim")


@dataclass(frozen=True)
class Active:
    """A swap that is in force."""

    what: tuple[str, ...]
    """What is ours, or has been told about us."""
    stats: Stats | None
    """What became of the calls; None for integrations.dtensor, which takes no calls from anybody."""


@dataclass(frozen=True)
class Status:
    """What `status` found; str() of it reads well."""

    active: dict[str, Active]
    """By the name of the module whose call did it, in flash_attn_ext, such as "integrations.sdpa" or "shim"."""

    def __str__(self) -> str:
        lines = []
        for name, swap in self.active.items():
            lines.append(f"{name}: {', '.join(swap.what)}")
            lines += [] if swap.stats is None else [f"  {line}" for line in str(swap.stats).splitlines()]
        return "\n".join(lines) or "nothing is swapped"


def status() -> Status:
    """Every swap that is in force in this process: what has been replaced or registered, and what became of the calls.

    Returns:
        A `Status`. Nothing is imported for it: what has not been imported cannot be in force.
    """
    found = {}
    for name in _PARTS:
        module = sys.modules.get(f"flash_attn_ext.{name}")
        if module is not None and (what := module.active()):
            found[name] = Active(what, module.stats() if hasattr(module, "stats") else None)
    return Status(found)


def __getattr__(name: str) -> ModuleType:
    if f"integrations.{name}" in _PARTS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
