"""flash-attn 2's forward and backward pass by themselves, for code that has an autograd of its own (ring attention).

Names, signatures and results are those of flash_attn.flash_attn_interface. Layouts as in flash_attn.py; nothing here is
differentiated. rng_state, (2,) int64, repeats the dropout of a forward pass in its backward pass. S_dmask is empty
unless it is asked for (return_softmax) and there is dropout. What they cannot take raises InputError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import counts
from .attention import attend
from .errors import InputError, raise_input_error
from .flash_attn import probabilities, scores_of
from .ops import ops

_KINDS = {
    **dict.fromkeys(("dout", "q", "k", "v", "out", "softmax_lse"), "tensor"),
    **dict.fromkeys(("dq", "dk", "dv"), "tensor?"),
    "dropout_p": "number",
}


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse (batch, heads, seqlen_q), S_dmask, rng_state)."""
    scores = scores_of(causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes)
    return _forward("_flash_attn_forward", q, k, v, scores, dropout_p, return_softmax)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse (heads, total_q), S_dmask, rng_state). block_table and leftpad_k have to be None."""
    function = "_flash_attn_varlen_forward"
    given = {"block_table": block_table, "leftpad_k": leftpad_k}
    if caches := [name for name, x in given.items() if x is not None]:
        raise InputError(
            function, [f"{name} must be None: paged and padded caches are not supported" for name in caches]
        )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scores = scores_of(causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes, lengths)
    return _forward(function, q, k, v, scores, dropout_p, return_softmax, seqused_k)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv. Returns the rows' sums of dout * out, laid out as softmax_lse (batch, heads, seqlen_q).

    dq, dk and dv have the shape, dtype and device of q, k and v, or are None and not written.
    out and softmax_lse may be those over more keys than k and v: the gradients are then these keys' part.
    """
    scores = scores_of(causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes)
    inputs, gradients = (dout, None, q, k, v, out, softmax_lse), (dq, dk, dv)
    return _backward("_flash_attn_backward", inputs, gradients, scores, dropout_p, rng_state, deterministic)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`_flash_attn_backward` of packed sequences; softmax_lse and what is returned are (heads, total_q)."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scores = scores_of(causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes, lengths)
    inputs, gradients = (dout, None, q, k, v, out, softmax_lse), (dq, dk, dv)
    return _backward("_flash_attn_varlen_backward", inputs, gradients, scores, dropout_p, rng_state, deterministic)


@torch.no_grad()
def _forward(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: tuple[dict[str, Any], list[str]],
    dropout_p: float,
    return_softmax: bool,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, unmet = scores
    options = {**options, "seqused_k": seqused_k}
    try:
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
        if dropout_p > 0:
            rng_state.random_()
        dropout: dict[str, Any] = {"dropout_p": dropout_p, "rng_state": rng_state if dropout_p > 0 else None}
        out, lse = attend(function, q, k, v, unmet, **dropout, **options)
    except Exception as error:
        raise_input_error(function, error, {"q": q, "k": k, "v": v, "dropout_p": dropout_p}, _KINDS, unmet)
    counts.count("flash_attn")
    wanted = return_softmax and dropout_p > 0
    dropped = probabilities(function, q, k, rng_state, dropout_p, options) if wanted else q.new_empty(0)
    return out, lse, dropped, rng_state


@torch.no_grad()
def _backward(
    function: str,
    inputs: tuple[Any, ...],
    gradients: tuple[Tensor | None, ...],
    scores: tuple[dict[str, Any], list[str]],
    dropout_p: float,
    rng_state: Tensor | None,
    deterministic: bool,
) -> Tensor:
    """inputs: those of the op backward before its options."""
    options, unmet = scores
    dout, _, q, k, v, out, softmax_lse = inputs
    scale = options["softmax_scale"]
    lengths = [options[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    into = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    try:
        pairs = zip(into.items(), {"q": q, "k": k, "v": v}.items(), strict=True)
        differ = [(name, x, of, y) for (name, x), (of, y) in pairs if x is not None and _facts(x) != _facts(y)]
        unmet = [*unmet, *(f"{name} must be, as {of}, {_facts(y)}, got {_facts(x)}" for name, x, of, y in differ)]
        computed = ops.backward(
            *inputs,
            *(None, None, options["alibi_slopes"], None, *lengths[:2], None, None),
            rng_state if dropout_p > 0 else None,
            *lengths[2:],
            *options["window"],
            q.shape[-1] ** -0.5 if scale is None else scale,
            options["softcap"],
            dropout_p,
            q.is_cuda and torch.backends.cuda.matmul.allow_tf32,
            deterministic,
            False,
        )
    except Exception as error:
        given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse, "dropout_p": dropout_p}
        raise_input_error(function, error, given | into, _KINDS, unmet)
    if unmet:
        raise InputError(function, unmet)
    for result, gradient in zip(gradients, computed, strict=False):
        if result is not None:
            result.copy_(gradient)
    wide = torch.promote_types(out.dtype, torch.float32)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(-1, -2)


def _facts(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
