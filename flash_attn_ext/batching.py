"""Rules for torch.vmap: the mapped dimension joins the batch dimension, so that one call of the op does all members.

Where members cannot share a call, each gets its own: packed sequences, dropout (whose bits are numbered by the place in
the batch), sinks that differ, and gradients of sinks. A rule gets, after torch.vmap's own info and in_dims, the
arguments of its op, and calls the op as `call`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]
InDims = tuple[int | None, ...]
# Results, and where the mapped dimension is in each (None: nowhere).
Mapped = tuple[tuple[Tensor, ...], InDims]

# Tensor arguments of the op forward: q, k, v and nine optional ones, and places among them.
_TENSORS = 12
_SINKS, _CU_SEQLENS, _RNG_STATE = 6, 7, 11


def _of_a_member(rule: Call) -> Call:
    """An error is then of the shapes of one member, which are those that the caller gave."""

    def checked(call: Call, info: Any, in_dims: InDims, *args: Any) -> Any:
        try:
            return rule(call, info, in_dims, *args)
        except Exception:
            if info.batch_size > 0:
                call(*(x[0] if mapped else x for x, mapped in zip(*_in_front(in_dims, args), strict=True)))
            raise

    return checked


@_of_a_member
def forward(call: Call, info: Any, in_dims: InDims, *args: Any) -> Mapped:
    size = info.batch_size
    moved, mapped = _in_front(in_dims, args)
    if mapped[_SINKS] or _one_call_each(moved):
        return _one_by_one(call, size, moved, mapped)
    tensors = _fold_inputs(size, moved[:_TENSORS], mapped[:_TENSORS], bias_per_member=False)
    return _unfold(size, *call(*tensors, *moved[_TENSORS:])), (0, 0)


def backward(call: Call, info: Any, in_dims: InDims, *args: Any) -> Mapped:
    size = info.batch_size
    moved, mapped = _in_front(in_dims, args)
    # dout, dlse, (q, k, v), out, lse, (nine optional tensors), numbers
    inputs, inputs_mapped = moved[2:5] + moved[7 : _TENSORS + 4], mapped[2:5] + mapped[7 : _TENSORS + 4]
    bias, bias_requires_grad = inputs[3], moved[-1]
    if inputs[_SINKS] is not None or _one_call_each(inputs):
        return _one_by_one(call, size, moved, mapped)
    dout, dlse, out, lse = (_fold(size, moved[i], mapped[i]) for i in (0, 1, 5, 6))
    q, k, v, *options = _fold_inputs(size, inputs, inputs_mapped, bias_per_member=bias_requires_grad)
    dq, dk, dv, dbias, dsinks = call(dout, dlse, q, k, v, out, lse, *options, *moved[_TENSORS + 4 :])
    dq, dk, dv = _unfold(size, dq, dk, dv)
    if not bias_requires_grad:
        return (dq, dk, dv, dbias, dsinks), (0, 0, 0, None, None)
    (dbias,) = _unfold(size, dbias)
    if bias.shape[1 if inputs_mapped[3] else 0] == 1:
        dbias = dbias.sum(1, keepdim=True)
    return (dq, dk, dv, dbias, dsinks), (0, 0, 0, 0, None)


@_of_a_member
def merge(call: Call, info: Any, in_dims: InDims, *args: Any) -> Mapped:
    """For merge and its backward. Packed members, (total, heads, dim), make a dense batch; dense ones join theirs."""
    size = info.batch_size
    tensors = [_members(size, x, m) for x, m in zip(*_in_front(in_dims, args), strict=True)]
    packed = tensors[0].dim() == 4
    results = call(*tensors) if packed else _unfold(size, *call(*(x.flatten(0, 1) for x in tensors)))
    return tuple(results), (0,) * len(results)


def softmax(call: Call, info: Any, in_dims: InDims, *args: Any) -> tuple[Tensor, int]:
    """For softmax and its backward, which take any number of leading dimensions."""
    moved = zip(*_in_front(in_dims, args), strict=True)
    return call(*(_members(info.batch_size, x, mapped) for x, mapped in moved)), 0


def _one_call_each(inputs: Sequence[Any]) -> bool:
    """Packed sequences or dropout, by the tensor arguments of the op forward."""
    return inputs[_CU_SEQLENS] is not None or inputs[_RNG_STATE] is not None


def _one_by_one(call: Call, size: int, args: Sequence[Any], mapped: Sequence[bool]) -> Mapped:
    """One call for each member; the mapped arguments have their members in front."""
    calls = [call(*(x[i] if m else x for x, m in zip(args, mapped, strict=True))) for i in range(size)]
    results = tuple(torch.stack(members) for members in zip(*calls, strict=True))
    return results, (0,) * len(results)


def _in_front(in_dims: InDims, args: Sequence[Any]) -> tuple[list[Any], list[bool]]:
    """The arguments with the mapped dimension in front, and which have one."""
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(args, in_dims, strict=True)]
    return moved, [dim is not None for dim in in_dims]


def _members(size: int, x: Tensor, mapped: bool) -> Tensor:
    """(size, ...), where a tensor that is not mapped is repeated as a view."""
    return x if mapped else x.expand(size, *x.shape)


def _fold(size: int, x: Tensor | None, mapped: bool) -> Tensor | None:
    """(size * batch, ...)"""
    return None if x is None else _members(size, x, mapped).flatten(0, 1)


def _unfold(size: int, *results: Tensor) -> tuple[Tensor, ...]:
    """(size, batch, ...) from (size * batch, ...)"""
    return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in results)


def _fold_inputs(size: int, args: Sequence[Any], mapped: Sequence[bool], bias_per_member: bool) -> list[Any]:
    """Folds the tensor arguments of the op forward. `bias_per_member`: every member gets a bias of its own, because
    its gradient is wanted apart from the others'."""
    q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, rng_state = args
    batch = q.shape[1] if mapped[0] else q.shape[0]

    def scores(x: Tensor | None, mapped: bool, per_member: bool) -> Tensor | None:
        if x is None or (not mapped and not per_member and x.shape[0] == 1):
            return x
        x = _members(size, x, mapped)
        return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)

    def slopes(x: Tensor | None, mapped: bool) -> Tensor | None:
        if x is None or (not mapped and x.dim() == 1):
            return x
        x = _members(size, x, mapped)
        return (x if x.dim() == 3 else x[:, None].expand(-1, batch, -1)).flatten(0, 1)

    return [
        _fold(size, q, mapped[0]),
        _fold(size, k, mapped[1]),
        _fold(size, v, mapped[2]),
        scores(bias, mapped[3], bias_per_member),
        scores(mask, mapped[4], False),
        slopes(alibi_slopes, mapped[5]),
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        _fold(size, seqused_q, mapped[9]),
        _fold(size, seqused_k, mapped[10]),
        rng_state,
    ]
