"""Puts this package's kernels in the place of torch's flash attention kernels, below scaled_dot_product_attention.

On CUDA that is what torch.nn.attention.register_flash_attention_impl is for (where torch has it): _flash_attention_*
and _scaled_dot_product_flash_attention*, which varlen_attn, nested tensors and context parallelism call as well. On the
CPU torch has no such hook, and its kernel is overridden in the same way. A call that ours cannot take runs torch's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..errors import constraints_of
from ..ops import cuda_library_status, ops

IMPLEMENTATION = "fa_ext"

_BOTTOM_RIGHT_CAUSAL = 0
Report = Callable[[str | None], None]


class Overrides:
    """Kernels of ours in torch's dispatcher, and torch's own for what they decline. A handle of torch's registry."""

    def __init__(self, key: str, kernels: dict[str, Callable[..., Any]], report: Report) -> None:
        self.key = key
        self._library = Library("aten", "IMPL", key)
        for name, kernel in kernels.items():
            if not hasattr(torch.ops.aten, name):  # newer than this torch
                continue
            try:
                torchs = torch.library.get_kernel(f"aten::{name}", key)
            except RuntimeError:  # a torch without CUDA has none
                torchs = None
            with warnings.catch_warnings():  # torch warns that a kernel is overridden, which is the purpose
                warnings.simplefilter("ignore")
                self._library.impl(name, _with_fallback(name, kernel, torchs, key, report))

    def remove(self) -> None:
        self._library._destroy()


_installed: list[Overrides] = []
_before: list[str] = []


def install(report: Report) -> None:
    """Overrides torch's kernels. `report` is called with each call: None, or why it went back to torch's kernel."""
    try:
        _installed.append(Overrides("CPU", CPU_KERNELS, report))
        if cuda_library_status == "loaded":
            _install_on_cuda(report)
    except BaseException:
        uninstall()
        raise


def _install_on_cuda(report: Report) -> None:
    def overrides() -> Overrides:
        return Overrides("CUDA", CUDA_KERNELS, report)

    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        _installed.append(overrides())
        return
    if current := torch.nn.attention.current_flash_attention_impl():
        _before.append(current)
    torch.nn.attention.register_flash_attention_impl(IMPLEMENTATION, register_fn=overrides)
    torch.nn.attention.activate_flash_attention_impl(IMPLEMENTATION)


def uninstall() -> None:
    """Puts back what was there before `install`."""
    while _installed:
        _installed.pop().remove()
    if cuda_library_status == "loaded" and hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        if torch.nn.attention.current_flash_attention_impl() == IMPLEMENTATION:
            torch.nn.attention.restore_flash_attention_impl()
        while _before:
            torch.nn.attention.activate_flash_attention_impl(_before.pop())


def active() -> tuple[str, ...]:
    """Which kernels of torch's are ours at present."""
    found = [f"torch's flash kernels on {overrides.key}" for overrides in _installed]
    registered = hasattr(torch.nn.attention, "restore_flash_attention_impl")
    if registered and torch.nn.attention.current_flash_attention_impl() == IMPLEMENTATION:
        found.append(f"torch's flash kernels on CUDA, registered as {IMPLEMENTATION!r}")
    return tuple(found)


def _with_fallback(name: str, kernel: Callable[..., Any], torchs: Any, key: str, report: Report) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        try:
            result = kernel(*args, **options)
        except (_DeclinedError, RuntimeError) as error:
            why = "; ".join([str(error)] if isinstance(error, _DeclinedError) else constraints_of(error))
            if not why or torchs is None:
                raise
            report(f"{name}: {why}")
            keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            return torchs.call_boxed(keyset, *args, **options)
        report(None)
        return result

    return run


class _DeclinedError(Exception):
    """Names what a call asks for that our kernels do not have."""


def _options(
    query: Tensor,
    *,
    scale: float | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    left: int | None = None,
    right: int | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None),
    seqused_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    longest: tuple[int | None, int | None] = (None, None),
) -> tuple[Any, ...]:
    """The arguments of the ops after q, k and v, in the order of their schema."""
    left, right = (None if side is None or side < 0 else side for side in (left, right))
    tensors = (bias, mask, alibi_slopes, None, *cu_seqlens, None, seqused_k, rng_state if dropout_p > 0 else None)
    window = (left, _BOTTOM_RIGHT_CAUSAL if is_causal else right)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return *tensors, *longest, *window, scale, 0.0, dropout_p, query.is_cuda and torch.backends.cuda.matmul.allow_tf32


def _swap(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch, heads, seqlen, dim) from (batch, seqlen, heads, dim), and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _like(x: Tensor, out: Tensor) -> Tensor:
    """out with the strides of an empty_like(x), which torch's compiler has been promised."""
    if x.shape != out.shape:
        return out
    return torch.empty_like(x).copy_(out)


# ---- CPU ------------------------------------------------------------------------------------------------------------


def _cpu_options(query: Tensor, key: Tensor, is_causal: bool, attn_mask: Tensor | None, scale: float | None) -> Any:
    scores: dict[str, Any] = {}
    if attn_mask is not None:
        four = attn_mask[(None,) * (4 - attn_mask.dim())]
        scores = {"mask": four} if four.dtype == torch.bool else {"bias": four}
    options = list(_options(query, scale=scale, **scores))
    if is_causal:  # this kernel's diagonal starts in the top left corner
        options[12] = query.shape[2] - key.shape[2]
    return options


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    if dropout_p != 0:
        raise _DeclinedError("dropout_p != 0")
    options = _cpu_options(query, key, is_causal, attn_mask, scale)
    out, lse = ops.forward(*_swap(query, key, value), *options)
    return _like(query, out.transpose(1, 2)), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    if dropout_p != 0:
        raise _DeclinedError("dropout_p != 0")
    options = _cpu_options(query, key, is_causal, attn_mask, scale)
    dout, q, k, v, out = _swap(grad_out, query, key, value, out)
    gradients = ops.backward(dout, None, q, k, v, out, logsumexp, *options, True, False)
    return _swap(*gradients[:3])


CPU_KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}

# ---- CUDA -----------------------------------------------------------------------------------------------------------


def _cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward. num_splits is advice on speed."""
    if return_debug_mask:
        raise _DeclinedError("return_debug_mask")
    if block_table is not None:
        raise _DeclinedError("block_table")
    # Where torch keeps the state of its generator, ours keeps seed and offset: its backward gets them back.
    rng_state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p > 0:
        rng_state.random_()
    options = _options(
        query,
        scale=scale,
        dropout_p=dropout_p,
        is_causal=is_causal,
        left=window_size_left,
        right=window_size_right,
        alibi_slopes=alibi_slopes,
        cu_seqlens=(cum_seq_q, cum_seq_k),
        seqused_k=seqused_k,
        rng_state=rng_state,
        longest=(None, None) if cum_seq_q is None else (max_q, max_k),
    )
    out, lse = ops.forward(query, key, value, *options)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    return _like(query, out), lse, rng_state.view(torch.uint64), unused, query.new_empty(0)


def _cuda_forward_inplace(out: Tensor, *args: Any, **options: Any) -> Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace"""
    attended, lse, *_ = _cuda_forward(*args, **options)
    out.copy_(attended)
    return lse


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_backward"""
    packed = cum_seq_q is not None and cum_seq_q.numel() > 0
    options = _options(
        query,
        scale=scale,
        dropout_p=dropout_p,
        is_causal=is_causal,
        left=window_size_left,
        right=window_size_right,
        cu_seqlens=(cum_seq_q, cum_seq_k) if packed else (None, None),
        rng_state=rng_state.view(torch.int64),
        longest=(max_q, max_k) if packed else (None, None),
    )
    gradients = ops.backward(grad_out, None, query, key, value, out, logsumexp, *options, True, False)[:3]
    return tuple(_like(x, gradient) for x, gradient in zip((query, key, value), gradients, strict=True))


def _cuda_sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention"""
    q, k, v = _swap(query, key, value)
    longest = query.shape[2], key.shape[2]
    results = _cuda_forward(q, k, v, None, None, *longest, dropout_p, is_causal, return_debug_mask, scale=scale)
    out, lse, rng_state, unused, debug = results
    return _like(query, out.transpose(1, 2)), lse, None, None, *longest, rng_state, unused, debug


def _cuda_sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward"""
    dout, q, k, v, out = _swap(grad_out, query, key, value, out)
    return _swap(*_cuda_backward(dout, q, k, v, out, logsumexp, *args, **options))


CUDA_KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _cuda_forward,
    "_flash_attention_forward_no_dropout_inplace": _cuda_forward_inplace,
    "_flash_attention_backward": _cuda_backward,
    "_scaled_dot_product_flash_attention": _cuda_sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _cuda_sdpa_backward,
}
