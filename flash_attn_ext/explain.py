"""explain: which backend and kernel a call takes, and why the others decline. backends: limits the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import _C
from .attention import autocast, window_of
from .errors import InputError


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; str() of it reads well."""

    backend: str | None
    """The backend that takes the call; None where all decline, and the call would raise."""
    kernel: str | None
    """Its forward kernel, with instruction set and tiles."""
    backward_kernel: str | None
    """Its backward kernel."""
    declined: dict[str, tuple[str, ...]]
    """For every other backend that is loaded, in dispatch order, why it is not the one."""

    def __str__(self) -> str:
        first = (
            f"{self.backend}: {self.kernel}; {self.backward_kernel}" if self.backend else "no backend takes this call"
        )
        return "\n".join([first, *(f"{name} declines: {'; '.join(why)}" for name, why in self.declined.items())])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    device: str | None = None,
) -> Explanation:
    """Which backend and kernel the same call of `attention` (with cu_seqlens_q: `attention_varlen`) takes, and why the
    others decline. Nothing is computed; the tensors may be meta tensors. What is not listed is as in those functions.

    Args:
        device: "cpu" or "cuda"; None: q's, and the CPU for a meta tensor.

    Returns:
        An `Explanation`.

    Raises:
        InputError: q, k or v have the wrong number of dimensions or a dtype without kernels, or window_size is wrong.
            Other constraints are left to the call itself.
    """
    window, unmet = window_of(causal, window_size)
    packed = cu_seqlens_q is not None
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dim() != (3 if packed else 4):
            layout = "3 dimensions beside cu_seqlens" if packed else "4 dimensions"
            unmet.append(f"{name} must have {layout}, got shape {tuple(x.shape)}")
    if unmet:
        raise InputError("explain", unmet)

    *batch, seqlen_q, heads, head_dim = q.shape
    _, seqlen_k, heads_kv, _ = (1, *k.shape)[-4:]
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        batch = [cu_seqlens_q.numel() - 1]
        seqlen_q = _longest(cu_seqlens_q, max_seqlen_q, seqlen_q)
        seqlen_k = _longest(cu_seqlens_k, max_seqlen_k, seqlen_k)
    facts: dict[str, Any] = {
        "device": device or ("cpu" if q.device.type == "meta" else q.device.type),
        "dtype": str(autocast(q, k, v, None)[0].dtype).removeprefix("torch."),
        "batch": batch[0],
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "heads": heads,
        "heads_kv": heads_kv,
        "head_dim": head_dim,
        "head_dim_v": v.shape[-1],
        "packed": packed,
        "seqused_q": seqused_q is not None,
        "seqused_k": seqused_k is not None,
        "window_left": window[0],
        "window_right": window[1],
        "softmax_scale": head_dim**-0.5 if softmax_scale is None else softmax_scale,
        "softcap": softcap,
        "bias": bias is not None,
        "mask": mask is not None,
        "alibi_slopes": alibi_slopes is not None,
        "sinks": sinks is not None,
        "dropout_p": dropout_p,
        "deterministic": deterministic,
    }
    try:
        candidates = list(zip(_C.explain(**facts), _C.explain(**facts, backward=True), strict=True))
    except ValueError as error:
        raise InputError("explain", [str(error)]) from None

    backend = kernel = backward_kernel = None
    declined = {}
    for forward, backward in candidates:
        if forward["accepted"] and backend is None:
            backend, kernel, backward_kernel = forward["backend"], forward["kernel"], backward["kernel"]
        else:
            why = forward["reasons"] or [f"it would take the call, but {backend} comes first"]
            declined[forward["backend"]] = tuple(why)
    return Explanation(backend, kernel, backward_kernel, declined)


def _longest(cu_seqlens: Tensor, hint: int | None, total: int) -> int:
    """What is known of the longest sequence without waiting for a device."""
    if hint is not None:
        return hint
    if cu_seqlens.device.type != "cpu" or cu_seqlens.numel() < 2:
        return total
    return int(cu_seqlens.diff().max())


@contextmanager
def backends(*names: str) -> Iterator[None]:
    """Within it, only these backends are considered: "cpu", "sm80", "sm90", as far as they are loaded.

    For tests and comparisons. Holds for all threads; the environment variable FAE_BACKENDS ("cpu,sm80") does the same
    for a whole process. No names: all backends.

    Raises:
        InputError: a name that no loaded backend has.
    """
    before = _C.backends()
    _set_backends(names)
    try:
        yield
    finally:
        _C.set_backends(before)


def _set_backends(names: Sequence[str]) -> None:
    try:
        _C.set_backends(list(names))
    except ValueError as error:
        raise InputError("backends", [str(error)]) from None
