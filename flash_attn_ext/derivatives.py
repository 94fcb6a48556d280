"""Derivatives of attention that the kernels do not compute: forward mode, and those of the gradient, of any order.

They are made of torch's operations, from one function that is linear in the values and has lse as an argument,

    weighted(q, k, v, bias, sinks, lse) -> (o, l),   o_i = sum_j P_ij D_ij v_j,   l_i = sum_j P_ij + e^(sink - lse_i),
    P_ij = e^(score_ij - lse_i),   D: dropout.

With lse held fixed, its directional derivative (o', l') gives that of attention, lse' = l' and out' = o' - lse' out;
its transpose at (dout, -delta), delta = sum_d dout out - dlse, gives attention's gradient (arXiv 2307.08691, section
3.1.2). What is a derivative of these two is left to torch.func, to which out and lse are variables like the others.

Keys are taken a tile at a time, and a tile's scores are recomputed wherever they are needed again (`Recomputed`), so
that no derivative of any order holds S x S numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, autograd
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from . import reference
from .errors import InputError
from .ops import stats_dtype

TILE = 128  # keys; a multiple of the 16 by which dropout numbers its blocks

Tensors = tuple[Tensor, ...]
Function = Callable[..., Any]
Given = dict[str, Any]  # tensors by name of the argument; None: not given
VARIABLES = ("q", "k", "v", "bias", "sinks")
_FIXED = ("mask", "alibi_slopes", "seqused_q", "seqused_k", "rng_state")


@dataclass(frozen=True)
class Numbers:
    """The numbers among the arguments of the op forward that its result depends on."""

    window: tuple[int | None, int | None]
    softmax_scale: float
    softcap: float
    dropout_p: float


def tangents(given: Given, numbers: Numbers, out: Tensor, lse: Tensor, directions: Given) -> tuple[Tensor, Tensor]:
    """The directional derivative of (out, lse): J (q', k', v', bias', sinks').

    given: the tensor arguments of the op forward. directions: by variable; None: zero.
    """
    names, primals = _present(given, VARIABLES)
    chosen = [directions.get(name) for name in names]
    along = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(primals, chosen, strict=True))
    function = partial(_weighted_of, given, numbers, lse, names)
    o, total = directional(function, primals, along)
    t_out = o - total.transpose(-1, -2).unsqueeze(-1) * out.to(o.dtype)
    return t_out.to(out.dtype), total.to(lse.dtype)


def gradients(given: Given, numbers: Numbers) -> dict[str, Tensor]:
    """What the op backward computes, by variable. given: its tensor arguments."""
    out, lse, dout, dlse = (given[name] for name in ("out", "lse", "dout", "dlse"))
    dtype = lse.dtype
    dout = dout.to(dtype)
    delta = (dout * out.to(dtype)).sum(-1).transpose(-1, -2)
    delta = delta if dlse is None else delta - dlse
    names, variables = _present(given, VARIABLES)
    found = transposed(partial(_weighted_of, given, numbers, lse, names), variables, (dout, -delta))
    return dict(zip(names, found, strict=True))


def transposed(function: Function, variables: Tensors, cotangents: Any) -> Tensors:
    """J^T cotangents, where J is the Jacobian of function(*variables), a tuple."""
    if torch.compiler.is_compiling():  # which begins again inside code that it has left to Python
        from . import tracing

        found: Tensors = tracing.in_python(transposed, function, variables, cotangents)
        return found
    back: Tensors = torch.func.vjp(function, *variables)[1](cotangents)
    return back


def directional(function: Function, variables: Tensors, directions: Tensors) -> Tensors:
    """J directions, where J is the Jacobian of function(*variables), a tuple."""
    if torch.compiler.is_compiling():
        from . import tracing

        found: Tensors = tracing.in_python(directional, function, variables, directions)
        return found
    variables = tuple(x.contiguous() for x in variables)  # torch makes no dual of an expanded tensor
    if forward_ad._current_level < 0 or eager_transforms.JVP_NESTING > 0:
        along: Tensors = torch.func.jvp(function, variables, directions)[1]
        return along
    # Inside torch.autograd.forward_ad, torch.func.jvp refuses to open a level of its own.
    if torch._C._are_functorch_transforms_active():
        # What is here is differentiated in reverse, and duals of a live level would keep that graph until the level
        # ends: a tangent's graph saves the dual, which holds the tangent. The transpose of the transpose has no duals.
        zeros = tuple(torch.zeros_like(x) for x in function(*variables))
        return transposed(lambda *x: transposed(function, variables, x), zeros, directions)
    # The live level serves.
    with forward_ad._set_fwd_grad_enabled(True):
        results = function(*(forward_ad.make_dual(x, t) for x, t in zip(variables, directions, strict=True)))
        parts = [forward_ad.unpack_dual(x) for x in results]
    return tuple(torch.zeros_like(x) if t is None else t for x, t in parts)


def forward_mode(rule: Function) -> Function:
    """Makes the static method jvp(ctx, *directions) of an autograd.Function from rule(ctx, saved tensors, *directions).

    torch switches forward mode off around jvp, so that in a jvp of a jvp the outer derivative of what the inner one
    computes would silently be zero. Here it is on, and the saved tensors come without their directions at this level.
    """

    def jvp(ctx: Any, *directions: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            floating = (x is not None and x.is_floating_point() for x in ctx.saved_tensors)
            pairs = zip(ctx.saved_tensors, floating, strict=True)
            saved = tuple(forward_ad.unpack_dual(x).primal if has_directions else x for x, has_directions in pairs)
            return rule(ctx, saved, *directions)

    return jvp


class Recomputed(autograd.Function):
    """function(*tensors) -> a tuple of tensors, from its inputs alone whenever a derivative needs it again.

    The first `variables` tensors have derivatives, which are Recomputed themselves: any order, and none of them keeps
    more than inputs.
    """

    @staticmethod
    def forward(function: Function, variables: int, *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.variables, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        count, tensors = ctx.variables, ctx.saved_tensors
        function = partial(_transposed, ctx.function, count, len(cotangents))
        results = recomputed(function, [*tensors[:count], *cotangents], tensors[count:])
        return None, None, *results, *[None] * (len(tensors) - count)

    @staticmethod
    @forward_mode
    def jvp(ctx: Any, tensors: Tensors, _: None, __: None, *directions: Tensor | None) -> Any:
        count = ctx.variables
        pairs = zip(tensors[:count], directions[:count], strict=True)
        given = [torch.zeros_like(x) if t is None else t for x, t in pairs]
        return recomputed(partial(_directional, ctx.function, count), [*tensors[:count], *given], tensors[count:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], function: Function, variables: int, *tensors: Tensor) -> Any:
        # Not torch's generated rule: through that, forward_mode could not take the directions off.
        results = recomputed(torch.vmap(function, in_dims[2:]), tensors[:variables], tensors[variables:])
        return results, (0,) * len(results)


def recomputed(function: Function, variables: Sequence[Tensor], fixed: Sequence[Tensor]) -> Any:
    """function(*variables, *fixed), differentiable in the variables."""
    apply: Any = Recomputed.apply
    return apply(function, len(variables), *variables, *fixed)


def _transposed(function: Function, count: int, outputs: int, *tensors: Tensor) -> Tensors:
    """J^T (cotangents), of the first `count` arguments; tensors: those, the cotangents, and what is fixed."""
    variables, cotangents, fixed = tensors[:count], tensors[count : count + outputs], tensors[count + outputs :]
    return transposed(lambda *x: function(*x, *fixed), variables, cotangents)


def _directional(function: Function, count: int, *tensors: Tensor) -> Any:
    """J (directions), of the first `count` arguments; tensors: those, their directions, and what is fixed."""
    variables, directions, fixed = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    return directional(lambda *x: function(*x, *fixed), variables, directions)


def _present(given: Given, names: Sequence[str]) -> tuple[tuple[str, ...], Tensors]:
    pairs = [(name, x) for name in names if (x := given.get(name)) is not None]
    return tuple(name for name, _ in pairs), tuple(x for _, x in pairs)


def _weighted_of(
    given: Given, numbers: Numbers, lse: Tensor, names: Sequence[str], *variables: Tensor
) -> tuple[Tensor, Tensor]:
    """`weighted` as a function of its variables: (o, l), in the layouts of out and lse."""
    tensors = {**given, **dict(zip(names, variables, strict=True)), "lse": lse}
    return _packed(tensors, numbers) if given.get("cu_seqlens_q") is not None else _dense(tensors, numbers, 0)


def _packed(given: Given, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """One sequence after the other; rows after the last one belong to none, and are 0."""
    q, k, v, lse, cu_q, cu_k = (given[name] for name in ("q", "k", "v", "lse", "cu_seqlens_q", "cu_seqlens_k"))
    if _is_mapped(cu_q) or _is_mapped(cu_k):
        line = "cu_seqlens_q and cu_seqlens_k must be the same for all members of a torch.vmap of derivatives"
        raise InputError("attention_varlen", [f"{line} other than the gradient, got mapped ones"])
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    outs, sums = [], []
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        parts = {"q": q[None, rows], "k": k[None, keys], "v": v[None, keys], "lse": lse[None, :, rows]}
        for name in ("bias", "mask"):
            if (x := given[name]) is not None:
                x = x[b : b + 1] if x.shape[0] > 1 else x
                parts[name] = reference.fitted(x, rows.stop - rows.start, keys.stop - keys.start)
        for name in ("seqused_q", "seqused_k"):
            if (x := given[name]) is not None:
                parts[name] = x[b : b + 1]
        if (slopes := given["alibi_slopes"]) is not None:
            parts["alibi_slopes"] = slopes if slopes.dim() == 1 else slopes[b]
        o, total = _dense({**given, **parts}, numbers, b)
        outs.append(o[0])
        sums.append(total[0])
    tail = len(q) - starts_q[-1]
    outs.append(lse.new_zeros(tail, q.shape[1], v.shape[-1]))
    sums.append(lse.new_zeros(q.shape[1], tail))
    return torch.cat(outs), torch.cat(sums, -1)


def _is_mapped(x: Tensor) -> bool:
    """Whether torch.vmap maps over a dimension of x, at any level."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def _dense(given: Given, numbers: Numbers, first_batch: int) -> tuple[Tensor, Tensor]:
    q, k, v, sinks, lse = (given[name] for name in ("q", "k", "v", "sinks", "lse"))
    batch, rows, heads, _ = q.shape
    o, total = lse.new_zeros(batch, rows, heads, v.shape[-1]), torch.zeros_like(lse)
    for first in range(0, k.shape[1], TILE):
        keys = slice(first, first + TILE)
        tile = {**given, "k": k[:, keys], "v": v[:, keys]}
        for name in ("bias", "mask"):
            if (x := given[name]) is not None and x.shape[3] > 1:
                tile[name] = x[..., keys]
        names, variables = _present(tile, (*VARIABLES[:4], "lse"))
        fixed_names, fixed = _present(tile, _FIXED)
        function = partial(_tile, numbers, k.shape[1], first, first_batch, (*names, *fixed_names))
        o_tile, total_tile = recomputed(function, variables, fixed)
        o, total = o + o_tile, total + total_tile
    if sinks is not None:
        used = _rows_used(given.get("seqused_q"), rows, q.device).squeeze(-1)
        seen = used & ~lse.isneginf()
        total = total + torch.where(seen, (sinks.to(lse.dtype)[:, None] - lse.masked_fill(~seen, 0.0)).exp(), 0.0)
    return o, total


def _tile(
    numbers: Numbers, seqlen_k: int, first: int, first_batch: int, names: Sequence[str], *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """`weighted` of a tile of keys, which begins with key `first` of seqlen_k, without the sink."""
    given = dict(zip(names, tensors, strict=True))
    q, k, v, lse = (given[name] for name in ("q", "k", "v", "lse"))
    dtype = stats_dtype(q.dtype)
    q, k, v = (x.to(dtype) for x in reference.by_head(q, k, v))
    batch, heads, rows, _ = q.shape
    row_used = _rows_used(given.get("seqused_q"), rows, q.device)
    length_q, length_k = (_used(given.get(f"seqused_{side}"), n) for side, n in (("q", rows), ("k", seqlen_k)))
    key = torch.arange(first, first + k.shape[2], device=q.device)
    key_used = key[None, None, None] < length_k  # (batch or 1, 1, 1, keys)
    offset = key - (torch.arange(rows, device=q.device)[:, None] + length_k - length_q)
    visible = row_used & key_used & reference.in_window(offset, numbers.window)
    if "mask" in given:
        visible = visible & given["mask"]

    # What lies beyond the lengths may be NaN, and 0 * NaN is NaN.
    q = q.masked_fill(~row_used, 0.0)
    k, v = (x.masked_fill(~key_used.transpose(-1, -2), 0.0) for x in (k, v))
    scores = (numbers.softmax_scale * q) @ k.transpose(-1, -2)
    if numbers.softcap:
        scores = numbers.softcap * torch.tanh(scores / numbers.softcap)
    if "alibi_slopes" in given:
        scores = scores - given["alibi_slopes"].to(dtype).expand(batch, heads)[..., None, None] * offset.abs()
    if "bias" in given:
        scores = scores + given["bias"].to(dtype)
    scores = scores.masked_fill(~visible, reference.NEGATIVE_INFINITY)
    p = (scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    row_sum = p.sum(-1)
    if numbers.dropout_p > 0:
        place = {"first_batch": first_batch, "first_key": first}
        keep = reference.dropout_keep_mask(
            given["rng_state"], batch, heads, rows, k.shape[2], numbers.dropout_p, **place
        )
        p = p * keep * (1 / (1 - numbers.dropout_p) if numbers.dropout_p < 1 else 0.0)
    # Rows without use take no part in what comes back, either: their incoming gradients may be NaN.
    o = (p @ v).masked_fill(~row_used, 0.0)
    return o.transpose(1, 2), row_sum.masked_fill(~row_used.squeeze(-1), 0.0)


def _used(seqused: Tensor | None, length: int) -> Tensor | int:
    """Rows or keys in use: (batch, 1, 1, 1), or the same for all."""
    return length if seqused is None else seqused.long().clamp(0, length)[:, None, None, None]


def _rows_used(seqused: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """bool (batch or 1, 1, rows, 1)"""
    return torch.arange(rows, device=device)[None, None, :, None] < _used(seqused, rows)
