"""What the parts of the demo share: the attention that ours is compared with, the device, timing and plots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .. import explain
from ..verify import cuda_ops_loaded

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
COLOURS = {"softmax": "#a7a7a7", "ours": "#d1495b"}


@dataclass
class Demo:
    """Where the demo prints and draws, and whether to be quick about it."""

    console: Console
    output: Path
    quick: bool = False
    failures: list[str] = field(default_factory=list)

    def check(self, passed: bool, claim: str) -> None:
        """Prints the claim with its outcome; a failed one makes the command fail."""
        self.console.print(f"  [green]ok[/]      {claim}" if passed else f"  [bold red]FAILED[/]  {claim}")
        if not passed:
            self.failures.append(claim)

    @contextmanager
    def plot(self, name: str, columns: int) -> Iterator[list[Axes]]:
        """Axes side by side, saved as ``name``.png."""
        figure, grid = plt.subplots(1, columns, figsize=(5.0 * columns, 3.8), squeeze=False, layout="constrained")
        yield list(grid[0])
        path = self.output / f"{name}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        self.console.print(f"  plot: {path}")


def causal_softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with the whole matrix of scores; q, k, v (batch, seqlen, heads, head_dim)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def attention_device() -> torch.device:
    """The GPU where there is one that attention has a kernel for, else the CPU."""
    q = torch.empty(1, 1, 1, 64, device="meta")
    on_gpu = torch.cuda.is_available() and explain(q, q, q, device="cuda").backend is not None
    return torch.device("cuda" if on_gpu else "cpu")


def softmax_device() -> torch.device:
    """The GPU where there is one and the CUDA library is loaded, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and cuda_ops_loaded() else "cpu")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Shortest of three calls; of one, if that is long."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    return first if first > 1 else min(first, once(), once())


def mib(count: float) -> str:
    return "-" if math.isnan(count) else f"{count / 2**20:,.1f} MiB"
