"""The interface behind which everyone is measured, and the numbers that everyone gets.

Every candidate gets the same numbers as contiguous tensors in the layout that it works on natively, so no one pays for
a transpose.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from suites import Case
from torch import Tensor

Attention = Callable[..., Tensor]  # of q, k, v and, where the case has one, the bias


@dataclass
class Inputs:
    """Tensors of one case in the layout (batch, row, head, dim); packed sequences are a batch of one."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    bias: Tensor | None = None  # (batch or 1, head, row, key)
    mask: Tensor | None = None  # (batch, 1, row, key) bool, True where the pair counts
    cu_seqlens: Tensor | None = None  # int32 (number of packed sequences + 1)
    alibi_slopes: Tensor | None = None  # float32 (head)
    sinks: Tensor | None = None  # float32 (head)


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    batch, rows, keys = case.batch, case.seqlen_q, case.seqlen_k
    if case.lengths:
        batch, rows, keys = 1, sum(case.lengths), sum(case.lengths)
    q, dout = normal(batch, rows, case.heads, case.head_dim), normal(batch, rows, case.heads, case.head_dim)
    k, v = normal(batch, keys, case.heads_kv, case.head_dim), normal(batch, keys, case.heads_kv, case.head_dim)
    inputs = Inputs(q, k, v, dout)
    if case.bias:
        inputs.bias = normal(batch if case.bias == "batch" else 1, case.heads, rows, keys)
    if case.mask:
        hidden = torch.rand((batch, 1, rows, keys), generator=generator, device=device) < 0.5
        # No row is left without a key: candidates differ in what they make of that.
        inputs.mask = ~hidden | torch.eye(rows, keys, dtype=torch.bool, device=device)
    if case.alibi:
        inputs.alibi_slopes = 2 ** torch.linspace(-8 / case.heads, -8, case.heads, device=device)
    if case.sinks:
        inputs.sinks = torch.randn(case.heads, generator=generator, device=device)
    if case.lengths:
        starts = torch.tensor((0, *case.lengths)).cumsum(0)
        inputs.cu_seqlens = starts.to(device, torch.int32)
    return inputs


def visible(case: Case, device: str) -> Tensor | None:
    """(seqlen_q, seqlen_k) bool, True where causal order and window let the pair count; None when every pair does."""
    if not case.causal:
        return None
    row = torch.arange(case.seqlen_q, device=device)[:, None] + case.seqlen_k - case.seqlen_q
    column = torch.arange(case.seqlen_k, device=device)
    return (column <= row) if case.window is None else (column <= row) & (column >= row - case.window)


class Prepared:
    """A candidate with its inputs laid out: ``forward()`` without autograd, ``backward()`` alone on a kept graph."""

    def __init__(self, attention: Attention, inputs: Inputs, to_native: Callable[[Tensor], Tensor]):
        self._attention = attention
        q, k, v, self._dout = (to_native(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        leaves = (q, k, v) if inputs.bias is None else (q, k, v, inputs.bias)
        self._leaves = tuple(x.detach().requires_grad_() for x in leaves)
        self._out: Tensor | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._attention(*self._leaves)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, bias. The first call also computes the forward, so warm up before timing."""
        if self._out is None:
            self._out = self._attention(*self._leaves)
        return torch.autograd.grad(self._out, self._leaves, self._dout, retain_graph=True)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """One training step's worth of attention, nothing kept afterwards but its results."""
        out = self._attention(*self._leaves)
        return out.detach(), *torch.autograd.grad(out, self._leaves, self._dout)


# What a case can ask for beyond plain attention on unpacked tensors.
OPTIONS: dict[str, Callable[[Case], bool]] = {
    "packed": lambda case: bool(case.lengths),
    "bias": lambda case: bool(case.bias),
    "mask": lambda case: case.mask,
    "softcap": lambda case: case.softcap > 0,
    "alibi": lambda case: case.alibi,
    "sinks": lambda case: case.sinks,
    "dropout": lambda case: case.dropout > 0,
}


class Candidate:
    name: str
    heads_first: ClassVar[bool] = False  # native layout (batch, head, row, dim) rather than (batch, row, head, dim)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)  # where it is measured unless told otherwise
    directions: tuple[str, ...] = ("forward", "backward")  # those in which it differs from every other candidate
    takes: ClassVar[frozenset[str]] = frozenset()  # of "dense" and the keys of OPTIONS

    def why_not(self, case: Case, device: str) -> str:
        """Why this candidate cannot compute the case on the device; empty when it can."""
        needs = {name for name, asked in OPTIONS.items() if asked(case)} or {"dense"}
        names = {"packed": "packed sequences", "dense": "unpacked tensors", "mask": "boolean mask"}
        missing = [names.get(need, need) for need in sorted(needs - self.takes)]
        return f"takes no {' and no '.join(missing)}" if missing else ""

    def context(self) -> AbstractContextManager[object]:
        """Entered once around a batch of calls, so that switching global state is not timed."""
        return nullcontext()

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        raise NotImplementedError

    def to_native(self, x: Tensor, packed: bool) -> Tensor:
        if self.heads_first:
            return x.transpose(1, 2).contiguous()
        return x[0] if packed else x

    def from_native(self, x: Tensor, packed: bool) -> Tensor:
        if self.heads_first:
            return x.transpose(1, 2)
        return x[None] if packed else x

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        attention = self.attention(case, inputs)
        return Prepared(attention, inputs, lambda x: self.to_native(x, bool(case.lengths)))
