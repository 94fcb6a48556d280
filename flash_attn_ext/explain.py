"""explain: which backend and kernel a call takes, and why the others decline. backends: limits the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _C
from .attention import attend, lengths_of, window_of
from .errors import InputError, shown
from .ops import OPTIONAL_TENSORS, ops

# Of these optional tensors it only counts whether they are given.
_GIVEN = ("bias", "mask", "alibi_slopes", "sinks", "seqused_q", "seqused_k")


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; str() of it reads well."""

    backend: str | None
    """The backend that takes the call; None where all decline, and the call would raise."""
    kernel: str | None
    """Its forward kernel, with instruction set and tiles."""
    backward_kernel: str | None
    """Its backward kernel, or that of the next backend where it declines the backward."""
    declined: dict[str, tuple[str, ...]]
    """For every other backend that is loaded, in dispatch order, why it is not the one; and for the one, why it leaves
    the backward to another."""

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
    device: str | torch.device | None = None,
) -> Explanation:
    """Which backend and kernel the same call of `attention` (with cu_seqlens_q: `attention_varlen`) takes, and why the
    others decline. Nothing is computed; the tensors may be meta tensors. What is not listed is as in those functions.

    Args:
        device: the CPU or a CUDA device; None: q's, and the CPU for a meta tensor.

    Returns:
        An `Explanation`.

    Raises:
        InputError: what the call itself would raise, or device is another one.
    """
    window, unmet = window_of(causal, window_size)
    is_tensor = isinstance(q, Tensor)
    if device is None:
        device = q.device if is_tensor and q.device.type != "meta" else "cpu"
    kind = _device_type(device)
    if kind not in ("cpu", "cuda"):
        unmet.append(f"device must be 'cpu' or 'cuda', got {device!r}")
    found: Explanation = attend(
        "explain",
        q,
        k,
        v,
        unmet,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        **lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        # Stands for the state that the call would draw from torch's generator.
        rng_state=torch.empty(2, dtype=torch.int64, device=q.device) if is_tensor else None,
        deterministic=deterministic,
        call=partial(_explained, kind),
    )
    return found


def _explained(device: str, *arguments: Any) -> Explanation:
    """arguments: those of the op forward, and deterministic."""
    *op_arguments, deterministic = arguments
    if any(isinstance(x, Tensor) and x.layout != torch.strided for x in op_arguments):
        raise NotImplementedError("forward is not there for such tensors, though check is")
    batch, seqlen_q, seqlen_k = ops.check(*op_arguments)
    q, k, v = op_arguments[:3]
    given = dict(zip(OPTIONAL_TENSORS, op_arguments[3:], strict=False))
    left, right, softmax_scale, softcap, dropout_p, _ = op_arguments[-6:]
    facts: dict[str, Any] = {
        "device": device,
        "dtype": str(q.dtype).removeprefix("torch."),
        "batch": batch,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "heads": q.shape[-2],
        "heads_kv": k.shape[-2],
        "head_dim": q.shape[-1],
        "head_dim_v": v.shape[-1],
        "packed": given["cu_seqlens_q"] is not None,
        **{name: given[name] is not None for name in _GIVEN},
        "window_left": left,
        "window_right": right,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "deterministic": deterministic,
    }
    forwards, backwards = (_C.explain(**facts, backward=backward) for backward in (False, True))
    taken, backward_taken = (next((x for x in found if x["accepted"]), None) for found in (forwards, backwards))
    if taken is None:
        return Explanation(None, None, None, {x["backend"]: tuple(x["reasons"]) for x in forwards})

    def why_not(forward: dict[str, Any], backward: dict[str, Any]) -> list[str]:
        if forward is taken:
            return backward["reasons"]
        what = "takes the backward alone:" if backward is backward_taken else "would take the call, but"
        return forward["reasons"] or [f"it {what} {taken['backend']} comes first"]

    declined = {x["backend"]: tuple(why) for x, y in zip(forwards, backwards, strict=True) if (why := why_not(x, y))}
    backward_kernel = backward_taken["kernel"] if backward_taken else None
    return Explanation(taken["backend"], taken["kernel"], backward_kernel, declined)


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


def _device_type(device: Any) -> str:
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        return "unknown"


def _set_backends(names: Sequence[str]) -> None:
    if wrong := [shown(name) for name in names if not isinstance(name, str)]:
        raise InputError("backends", [f"a name must be a str, got {kind}" for kind in wrong])
    try:
        _C.set_backends(list(names))
    except ValueError as error:
        raise InputError("backends", [str(error)]) from None
