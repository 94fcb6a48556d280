"""Part 1: the same numbers from our attention and from torch softmax attention, at growing length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .. import attention, reference, softmax
from .common import COLOURS, Attention, Demo, attention_device, causal_softmax_attention, mib, seconds, softmax_device
from .memory import PeakMemory

HEADS, HEAD_DIM = 2, 64
REFERENCE_ROWS = 512  # the float64 reference works on blocks of so many rows


@dataclass
class Measured:
    error: float  # largest over out, dq, dk, dv
    seconds: float
    bytes: float


def step(attend: Callable[..., Any], inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Forward and backward with inputs [q, k, v]: [out, dq, dk, dv]."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def expected(inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """The step in float64, in blocks of rows, each with the keys up to its last row, so that memory stays small."""
    q, k, v, dout = (x.detach().double() for x in (*inputs, dout))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for start in range(0, q.shape[1], REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        seen = slice(0, min(rows.stop, q.shape[1]))
        block = [x.requires_grad_() for x in (q[:, rows], k[:, seen], v[:, seen])]
        results = step(partial(reference.attention, causal=True), block, dout[:, rows])
        out[:, rows], dq[:, rows] = results[:2]
        dk[:, seen] += results[2]
        dv[:, seen] += results[3]
    return [out, dq, dk, dv]


def measure(attend: Attention, inputs: list[Tensor], dout: Tensor, exact: list[Tensor]) -> Measured:
    device = inputs[0].device
    results = step(attend, inputs, dout)
    error = max(float((result.double() - x).abs().max()) for result, x in zip(results, exact, strict=True))
    results_bytes = sum(result.untyped_storage().nbytes() for result in results)
    del results
    with PeakMemory(device) as peak:
        step(attend, inputs, dout)
    return Measured(error, seconds(lambda: step(attend, inputs, dout), device), max(0.0, peak.bytes - results_bytes))


def compare(seqlen: int, device: torch.device) -> dict[str, Measured]:
    generator = torch.Generator().manual_seed(seqlen)
    *inputs, dout = (torch.randn(1, seqlen, HEADS, HEAD_DIM, generator=generator).to(device) for _ in range(4))
    for x in inputs:
        x.requires_grad_()
    exact = expected(inputs, dout)
    attentions: dict[str, Attention] = {"softmax": causal_softmax_attention, "ours": partial(attention, causal=True)}
    return {name: measure(attend, inputs, dout, exact) for name, attend in attentions.items()}


def run(demo: Demo) -> None:
    device = attention_device()
    lengths = (128, 256) if demo.quick else (512, 1024, 2048, 4096, 8192)
    demo.console.print(
        f"Causal attention, forward + backward, 1 x S x {HEADS} x {HEAD_DIM}, float32 on {device.type}.\n"
        "Error: the largest of out, dq, dk, dv against float64. Memory: the peak beyond inputs, output and gradients."
    )
    rows = {seqlen: compare(seqlen, device) for seqlen in track(lengths, "comparing", console=demo.console)}

    table = Table("S")
    for column in ("error", "time", "memory"):
        table.add_column(f"{column}\nsoftmax", justify="right")
        table.add_column(f"{column}\nours", justify="right", style="bold")
    for seqlen, row in rows.items():
        pair = row["softmax"], row["ours"]
        errors, times = [f"{m.error:.1e}" for m in pair], [f"{m.seconds * 1e3:,.1f} ms" for m in pair]
        table.add_row(str(seqlen), *errors, *times, *(mib(m.bytes) for m in pair))
    demo.console.print(table)

    # Ours may round differently, not worse: the project's own rule allows twice torch's error for outputs, three times
    # for gradients, and one rounding of the largest numbers here (about 4).
    worst = max(row["ours"].error / (3 * row["softmax"].error + 4 * 2**-23) for row in rows.values())
    demo.check(worst <= 1, "errors are no larger than softmax attention's, within rounding")
    if not math.isnan(rows[lengths[-1]]["ours"].bytes) and not demo.quick:
        less = rows[lengths[-1]]["softmax"].bytes / max(1.0, rows[lengths[-1]]["ours"].bytes)
        demo.check(less > 1, f"at S = {lengths[-1]} ours needs {less:.0f} times less memory")
    online_softmax(demo)

    with demo.plot("parity", 2) as (time_axes, memory_axes):
        for name, colour in COLOURS.items():
            measured = [row[name] for row in rows.values()]
            time_axes.loglog(lengths, [m.seconds * 1e3 for m in measured], "o-", label=name, color=colour)
            memory_axes.loglog(lengths, [m.bytes / 2**20 for m in measured], "o-", label=name, color=colour)
        time_axes.set(title="forward + backward", ylabel="ms")
        memory_axes.set(title="peak memory", ylabel="MiB beyond inputs and results")
        for axes in (time_axes, memory_axes):
            axes.set_xlabel("sequence length")
            axes.set_xticks(lengths, map(str, lengths))
            axes.minorticks_off()
        time_axes.legend(frameon=False)


def online_softmax(demo: Demo) -> None:
    """The normaliser by itself, which has a GPU kernel too."""
    device = softmax_device()
    table = Table("shape", "error torch", "error ours", "time torch", "time ours")
    equal = True
    for columns in (1000, 30_000) if demo.quick else (1000, 30_000, 1_000_000):
        x = torch.randn(16, columns, generator=torch.Generator().manual_seed(0)).to(device) * 5
        exact = x.double().softmax(-1)
        errors = [float((y.double() - exact).abs().max()) for y in (x.softmax(-1), softmax(x))]
        times = [seconds(partial(torch.softmax, x, -1), device), seconds(partial(softmax, x), device)]
        table.add_row(f"16 x {columns}", *(f"{e:.1e}" for e in errors), *(f"{t * 1e3:.2f} ms" for t in times))
        equal &= errors[1] <= 2 * errors[0] + 2**-23 * float(exact.max())
    demo.console.print(f"Online softmax over rows, float32 on {device.type}:", table)
    demo.check(equal, "online softmax equals torch.softmax")
