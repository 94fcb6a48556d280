"""scaled_dot_product_attention with the signature, layout and causal order of torch's."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import torch
from torch import Tensor

from .attention import attend
from .errors import InputError, raise_input_error, wrong_flags

_FUNCTION = "scaled_dot_product_attention"
_IN_OUR_LAYOUT = f"{_FUNCTION} (in the layout (batch, seqlen, heads, dim))"
# What the op calls arguments, which its errors name.
_NAMES = {"q": "query", "k": "key", "v": "value", "bias": "attn_mask", "mask": "attn_mask", "softmax_scale": "scale"}
_NAME = re.compile(rf"\b({'|'.join(_NAMES)})\b")
_BOTH = "is_causal must be False where attn_mask is given, got both"
_KINDS = {**dict.fromkeys(("query", "key", "value"), "tensor"), "attn_mask": "tensor?"}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A drop-in for torch.nn.functional.scaled_dot_product_attention: softmax(scale query key^T + attn_mask) value.

    Args:
        query: (..., seqlen_q, head_dim), usually (batch, heads, seqlen_q, head_dim); float16, bfloat16, float32 or, on
            the CPU, float64. The leading dimensions of query, key and value broadcast.
        key: (..., seqlen_k, head_dim).
        value: (..., seqlen_k, head_dim_v).
        attn_mask: broadcasts to (..., seqlen_q, seqlen_k). bool: True = attend; query's dtype or float32: added to the
            scores, with a gradient. Or torch.nn.attention.bias.causal_upper_left or causal_lower_right.
        dropout_p: applied always, in training or not, as torch's is.
        is_causal: row i sees keys 0 to i: the diagonal starts in the top left corner. Excludes attn_mask.
        scale: None is 1 / sqrt(head_dim).
        enable_gqa: the third dimension from the right is heads; those of key and value divide that of query.

    Returns:
        (..., seqlen_q, head_dim_v), query's dtype. A row that sees nothing is 0.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    try:
        if lines := wrong_flags(is_causal=is_causal, enable_gqa=enable_gqa):
            raise InputError(_FUNCTION, lines)
        q, k, v, bias, mask = query, key, value, None, None
        leading = None
        bottom_right = False
        if is_causal_bias(attn_mask):
            bottom_right = not _starts_top_left(attn_mask)
            _check_causal_bias(query, key, attn_mask, is_causal)
            attn_mask, is_causal = None, True
        if attn_mask is not None or not _is_usual(query, key, value, enable_gqa):
            leading = _leading_dimensions(query, key, value, attn_mask, is_causal, enable_gqa)
            q, k, v = (_batch_and_heads(x, leading, enable_gqa) for x in (query, key, value))
            if k.shape[1] != v.shape[1]:  # torch takes any two numbers that divide the heads of query
                heads_kv = math.lcm(k.shape[1], v.shape[1])
                k, v = (x.repeat_interleave(heads_kv // x.shape[1], 1) for x in (k, v))
            if attn_mask is not None:
                bias, mask = _scores(attn_mask, leading, query.dtype)
        out, _ = attend(
            _IN_OUR_LAYOUT,
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            # The window is aligned to the bottom right; the difference moves its diagonal to the top left.
            window=(None, (0 if bottom_right else query.shape[-2] - key.shape[-2]) if is_causal else None),
            softmax_scale=scale,
            bias=bias,
            mask=mask,
            dropout_p=dropout_p,
        )
        out = out.transpose(1, 2)
        return out if leading is None else out.reshape(*leading, *out.shape[2:])
    except Exception as error:
        if isinstance(error, InputError) and error.function == _IN_OUR_LAYOUT:
            lines = [_NAME.sub(lambda name: _NAMES[name[0]], line) for line in error.constraints]
            raise InputError(_IN_OUR_LAYOUT, lines) from None
        raise_input_error(_FUNCTION, error, locals(), _KINDS)


def is_causal_bias(attn_mask: Any) -> bool:
    """A torch.nn.attention.bias.CausalBias, which describes a mask and has no elements.

    Nobody has one who has not imported its module; the import brings in torch._dynamo.
    """
    bias = sys.modules.get("torch.nn.attention.bias")
    return bias is not None and isinstance(attn_mask, bias.CausalBias)


def without_causal_bias(attn_mask: Any, is_causal: bool, device: torch.device) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) that say the same, for a function that knows no CausalBias."""
    if not is_causal_bias(attn_mask):
        return attn_mask, is_causal
    if is_causal:
        raise InputError(_FUNCTION, [_BOTH])
    if _starts_top_left(attn_mask):
        return None, True
    rows, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows), False


def _starts_top_left(causal_bias: Any) -> bool:
    """As torch does, which then reads no sizes from it."""
    return causal_bias.variant.name == "UPPER_LEFT" or causal_bias.seq_len_q == causal_bias.seq_len_kv


def _check_causal_bias(query: Tensor, key: Tensor, causal_bias: Any, is_causal: bool) -> None:
    lines = [_BOTH] if is_causal else []
    sizes = (causal_bias.seq_len_q, causal_bias.seq_len_kv)
    given = (*query.shape[-2:-1], *key.shape[-2:-1])
    if not _starts_top_left(causal_bias) and sizes != given:
        lines.append(f"attn_mask, a causal_lower_right, must be of (seqlen_q, seqlen_k) = {given}, got {sizes}")
    if lines:
        raise InputError(_FUNCTION, lines)


def _is_usual(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """(batch, heads, seqlen, dim) with nothing to broadcast: what nearly every call has, and small calls feel."""
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4:
        return False
    grouped = enable_gqa and k[1] > 0 and q[1] % k[1] == 0
    return q[0] == k[0] == v[0] and k[1] == v[1] and (q[1] == k[1] or grouped)


def _leading_dimensions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> tuple[int, ...]:
    """Everything before (seqlen_q, head_dim_v) in the result; an InputError lists what keeps it from being found."""
    lines = []
    tensors = {"query": query, "key": key, "value": value}
    not_broadcast = 3 if enable_gqa else 2  # heads, seqlen, dim
    if attn_mask is not None:
        if is_causal:
            lines.append(_BOTH)
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            lines.append(f"attn_mask must be bool, float32 or query's {query.dtype}, got {attn_mask.dtype}")
    too_small = [name for name, x in tensors.items() if x.dim() < not_broadcast]
    for name in too_small:
        lines.append(f"{name} must have at least {not_broadcast} dimensions, got shape {tuple(tensors[name].shape)}")
    if too_small:
        raise InputError(_FUNCTION, lines)

    leading = _broadcast([x.shape[:-not_broadcast] for x in tensors.values()])
    if leading is None:
        given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        lines.append(f"all but the last {not_broadcast} dimensions of query, key and value must broadcast, got {given}")
        raise InputError(_FUNCTION, lines)
    if enable_gqa:
        heads = query.shape[-3]
        leading = (*leading, heads)
        for name in ("key", "value"):
            n = tensors[name].shape[-3]
            if heads % n if n else heads:
                lines.append(f"the heads of {name} must divide the {heads} of query, got {n}")
    if attn_mask is not None and attn_mask.dim() > len(leading) + 2:
        lines.append(f"attn_mask must have at most {len(leading) + 2} dimensions, got shape {tuple(attn_mask.shape)}")
    if lines:
        raise InputError(_FUNCTION, lines)
    return leading


def _broadcast(shapes: list[torch.Size]) -> tuple[int, ...] | None:
    if shapes[0] == shapes[1] == shapes[2]:
        return tuple(shapes[0])
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None


def _batch_and_heads(x: Tensor, leading: tuple[int, ...], enable_gqa: bool) -> Tensor:
    """(batch, heads, seqlen, dim), with the leading dimensions broadcast."""
    heads = x.shape[-3:-2] if enable_gqa else leading[-1:]
    return _four(x.expand(*leading[:-1], *heads, *x.shape[-2:]))


def _scores(attn_mask: Tensor, leading: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask as (bias, mask), each (batch or 1, heads or 1, seqlen_q or 1, seqlen_k or 1) or None."""
    if attn_mask.dim() > 4 or len(leading) > 2:
        attn_mask = attn_mask.expand(*leading[:-1], *((*(1,) * 4, *attn_mask.shape)[-3:]))
    scores = _four(attn_mask)
    if scores.dtype == torch.bool:
        return None, scores
    # Torch takes a float32 mask beside float64; the op's bias has q's dtype there.
    widen = dtype == torch.float64 and scores.dtype == torch.float32
    return scores.double() if widen else scores, None


def _four(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())] if x.dim() <= 4 else x.flatten(0, -4)
