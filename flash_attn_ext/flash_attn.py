"""Functions with the names, signatures and results of flash-attn 2, for code written for that package.

Layout (batch, seqlen, heads, head_dim), packed (total, heads, head_dim). As there, a negative side of window_size is no
limit, softcap <= 0 is off, and the causal diagonal ends in the bottom right corner. More than there: head dimensions up
to 512, float32 and float64, the CPU, a gradient through the returned lse.

All take the options of `attention` in flash-attn's order, and `return_attn_probs`: return (out, lse, S_dmask) instead
of out. S_dmask is there for tests: with dropout the probabilities (batch, heads, seqlen_q, seqlen_k), negative where
dropped; without dropout an empty tensor. What they cannot take raises InputError, a ValueError and TypeError that lists
every unmet constraint.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import counts
from .attention import attend, window_of
from .errors import InputError, as_integer, is_number, shown
from .padding import pad_input
from .reference import dropout_keep_mask


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim) -> out, of q's shape.

    With return_attn_probs, lse is (batch, heads, seqlen_q).
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend("flash_attn_func", q, k, v, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor: kv (batch, seqlen_k, 2, heads_kv, head_dim)."""
    function = "flash_attn_kvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = _unpack(function, "kv", kv, 2, "(batch, seqlen_k, 2, heads_kv, head_dim)")
    return _attend(function, q, k, v, options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor: qkv (batch, seqlen, 3, heads, head_dim)."""
    function = "flash_attn_qkvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = _unpack(function, "qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    return _attend(function, q, k, v, options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Packed sequences: q (total_q, heads, head_dim), k and v (total_k, heads_kv, head_dim) -> out, of q's shape.

    cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32. With return_attn_probs, lse is (heads, total_q). block_table has to
    be None: there is no paged cache of keys and values yet.
    """
    unmet = [] if block_table is None else ["block_table must be None: paged keys and values are not supported"]
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend("flash_attn_varlen_func", q, k, v, options, lengths, unmet)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor: kv (total_k, 2, heads_kv, head_dim)."""
    function = "flash_attn_varlen_kvpacked_func"
    k, v = _unpack(function, "kv", kv, 2, "(total_k, 2, heads_kv, head_dim)")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(function, q, k, v, options, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor: qkv (total, 3, heads, head_dim)."""
    function = "flash_attn_varlen_qkvpacked_func"
    q, k, v = _unpack(function, "qkv", qkv, 3, "(total, 3, heads, head_dim)")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(function, q, k, v, options, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen))


def _unpack(function: str, name: str, packed: Tensor, count: int, layout: str) -> tuple[Tensor, ...]:
    rank = layout.count(",") + 1
    is_dense = isinstance(packed, Tensor) and not packed.is_nested
    if not is_dense or packed.dim() != rank or packed.shape[-3] != count:
        given = f"shape {tuple(packed.shape)}" if is_dense else shown(packed)
        raise InputError(function, [f"{name} must be a tensor of shape {layout}, got {given}"])
    return packed.unbind(-3)


def _attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[Any, ...],
    lengths: tuple[Any, ...] = (None,) * 4,
    unmet: Sequence[str] = (),
) -> Any:
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs = options
    scores, wrong = scores_of(causal, window_size, softmax_scale, softcap, alibi_slopes, lengths)
    rng_state = None
    if return_attn_probs and isinstance(q, Tensor) and is_number(dropout_p) and float(dropout_p) > 0:
        rng_state = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=q.device)
    lines = [*unmet, *wrong]
    out, lse = attend(
        function, q, k, v, lines, dropout_p=dropout_p, rng_state=rng_state, deterministic=deterministic, **scores
    )
    counts.count("flash_attn")
    if not return_attn_probs:
        return out
    if rng_state is None:
        return out, lse, q.new_empty(0)
    return out, lse, probabilities(function, q, k, rng_state, dropout_p, scores)


def scores_of(
    causal: bool,
    window_size: Any,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    lengths: tuple[Any, ...] = (None,) * 4,
) -> tuple[dict[str, Any], list[str]]:
    """What `attend` takes, from flash-attn's arguments, and the constraints that they do not meet.

    lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
    """
    if isinstance(window_size, (tuple, list)):
        sides = [(side, as_integer(side)) for side in window_size]
        window_size = tuple(side if integer is None else max(integer, -1) for side, integer in sides)
    window, unmet = window_of(causal, window_size)
    scores = {
        "window": window,
        "softmax_scale": softmax_scale,
        "softcap": max(softcap, 0.0) if isinstance(softcap, Real) else softcap,
        "alibi_slopes": alibi_slopes,
        **dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths, strict=True)),
    }
    return scores, unmet


@torch.no_grad()
def probabilities(
    function: str, q: Tensor, k: Tensor, rng_state: Tensor, dropout_p: float, scores: dict[str, Any]
) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k), negative where dropped.

    Attention to values that are rows of an identity matrix gives the probabilities themselves, whatever the options.
    """
    columns = torch.arange(k.shape[-3], device=k.device)
    if scores["cu_seqlens_k"] is not None:
        columns, _ = _places(scores["cu_seqlens_k"], len(columns))
        seqlen_q, seqlen_k = (_longest(scores[f"cu_seqlens_{x}"], scores[f"max_seqlen_{x}"]) for x in "qk")
    else:
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    blocks = []
    for first in range(0, seqlen_k, 512):  # the largest head_dim_v
        block = torch.arange(first, min(first + 512, seqlen_k), device=k.device)
        identity = (columns[:, None] == block).to(q.dtype)
        blocks.append(attend(function, q, k, identity[:, None].expand(*k.shape[:-1], len(block)), **scores)[0])
    p = torch.cat(blocks, -1) if blocks else q.new_zeros(*q.shape[:-1], 0)
    if scores["cu_seqlens_q"] is not None:
        rows, sequence = _places(scores["cu_seqlens_q"], len(q))
        batch = len(scores["cu_seqlens_q"]) - 1
        inside = sequence < batch
        p = pad_input(p[inside], (sequence * seqlen_q + rows)[inside], batch, seqlen_q)
    batch, _, heads, _ = p.shape
    keep = dropout_keep_mask(rng_state, batch, heads, seqlen_q, seqlen_k, dropout_p)
    return torch.where(keep, p.transpose(1, 2), -p.transpose(1, 2))


def _longest(cu_seqlens: Tensor, hint: int | None) -> int:
    return int(hint if hint is not None else cu_seqlens.diff().max() if len(cu_seqlens) > 1 else 0)


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each packed row its place in its sequence, and which sequence that is (batch: none)."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row.to(torch.int32), right=True)
    return row - cu_seqlens[sequence], sequence
