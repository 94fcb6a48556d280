"""Who is measured: the ways to compute attention, behind one interface. A new peer is one subclass and one list entry.

Every candidate gets the same numbers as contiguous tensors in the layout that it works on natively, so no one pays for
a transpose.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from suites import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_attn_ext

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Inputs:
    """Tensors of one case in the layout (batch, row, head, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(seqlen: int, heads: int) -> Tensor:
        return torch.randn(case.batch, seqlen, heads, case.head_dim, generator=generator).to(device, dtype)

    q, dout = normal(case.seqlen_q, case.heads), normal(case.seqlen_q, case.heads)
    return Inputs(q, normal(case.seqlen_k, case.heads_kv), normal(case.seqlen_k, case.heads_kv), dout)


class Prepared:
    """A candidate with its inputs laid out: ``forward()`` without autograd, ``backward()`` alone on a kept graph."""

    def __init__(self, attention: Attention, inputs: Inputs, to_native: Callable[[Tensor], Tensor]):
        self._attention = attention
        q, k, v, self._dout = (to_native(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        self._leaves = tuple(x.requires_grad_() for x in (q, k, v))
        self._out: Tensor | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._attention(*self._leaves)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of q, k, v. The first call also computes the forward, so warm up before timing."""
        if self._out is None:
            self._out = self._attention(*self._leaves)
        return torch.autograd.grad(self._out, self._leaves, self._dout, retain_graph=True)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """One training step's worth of attention, nothing kept afterwards but its results."""
        out = self._attention(*self._leaves)
        return out.detach(), *torch.autograd.grad(out, self._leaves, self._dout)


class Candidate:
    name: ClassVar[str]
    heads_first: ClassVar[bool]  # native layout (batch, head, row, dim) rather than (batch, row, head, dim)

    def why_not(self, case: Case, device: str) -> str:
        """Why this candidate cannot compute the case on the device; empty when it can."""
        return ""

    def context(self) -> AbstractContextManager[object]:
        """Entered once around a batch of calls, so that switching global state is not timed."""
        return nullcontext()

    def attention(self, case: Case, device: str) -> Attention:
        raise NotImplementedError

    def to_native(self, x: Tensor) -> Tensor:
        return (x.transpose(1, 2) if self.heads_first else x).contiguous()

    def from_native(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.heads_first else x

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        return Prepared(self.attention(case, inputs.q.device.type), inputs, self.to_native)


def flash_options(case: Case) -> dict[str, Any]:
    """The case in the words of flash_attn_ext.attention."""
    return {"causal": case.causal, "window_size": (-1 if case.window is None else case.window, -1)}


class Ours(Candidate):
    name = "flash_attn_ext"
    heads_first = False

    def attention(self, case: Case, device: str) -> Attention:
        options = flash_options(case)
        return lambda q, k, v: flash_attn_ext.attention(q, k, v, **options)


def visible(case: Case, device: str) -> Tensor | None:
    """(seqlen_q, seqlen_k) bool, True where the pair counts; None when every pair does."""
    if not case.causal:
        return None
    row = torch.arange(case.seqlen_q, device=device)[:, None] + case.seqlen_k - case.seqlen_q
    column = torch.arange(case.seqlen_k, device=device)
    return (column <= row) if case.window is None else (column <= row) & (column >= row - case.window)


class Softmax(Candidate):
    """Attention as the textbook writes it: the whole score matrix, in the inputs' dtype."""

    name = "softmax"
    heads_first = True

    def why_not(self, case: Case, device: str) -> str:
        if device != "cpu":
            return ""
        # Probabilities kept for backward, their gradient, the scores' gradient and one temporary.
        need = 4 * case.batch * case.heads * case.seqlen_q * case.seqlen_k * getattr(torch, case.dtype).itemsize
        return f"needs {need / 2**30:.0f} GiB" if need > 0.6 * available_memory() else ""

    def attention(self, case: Case, device: str) -> Attention:
        allowed = visible(case, device)
        hidden = None if allowed is None else ~allowed
        group = case.heads // case.heads_kv

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = q.unflatten(1, (-1, group)).flatten(2, 3)  # the query heads of one KV head share its matrix product
            scores = (rows * case.head_dim**-0.5) @ k.transpose(-1, -2)
            if hidden is not None:
                scores = scores.unflatten(2, (group, -1)).masked_fill(hidden, -math.inf).flatten(2, 3)
            return (scores.softmax(-1) @ v).unflatten(2, (group, -1)).flatten(1, 2)

        return attend


class SDPA(Candidate):
    """torch's scaled_dot_product_attention with one of its backends.

    A window has to be a mask there; it is additive and made beforehand, which measures faster than a boolean one.
    """

    heads_first = True
    backend: ClassVar[SDPBackend]

    def context(self) -> AbstractContextManager[object]:
        return sdpa_kernel(self.backend)

    def attention(self, case: Case, device: str) -> Attention:
        bias: Tensor | None = None
        is_causal = case.causal and case.window is None and case.seqlen_q == case.seqlen_k
        allowed = visible(case, device)
        if allowed is not None and not is_causal:
            dtype = getattr(torch, case.dtype)
            bias = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, -math.inf)[None, None]
        return lambda q, k, v: scaled_dot_product_attention(
            q, k, v, bias, is_causal=is_causal, enable_gqa=case.heads != case.heads_kv
        )


class SDPAFlash(SDPA):
    name = "sdpa_flash"
    backend = SDPBackend.FLASH_ATTENTION


class SDPAMath(SDPA):
    name = "sdpa_math"
    backend = SDPBackend.MATH

    def why_not(self, case: Case, device: str) -> str:
        return Softmax().why_not(case, device)


def available_memory() -> float:
    """Bytes of main memory that can be taken now; unlimited where the system does not tell."""
    try:
        with open("/proc/meminfo") as meminfo:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo}
    except OSError:
        return math.inf
    return kib["MemAvailable"] * 1024


OURS = Ours.name
CANDIDATES: dict[str, Candidate] = {c.name: c for c in (Ours(), SDPAFlash(), SDPAMath(), Softmax())}
