"""Rules for torch.vmap: the mapped dimension joins the batch dimension, so that one call of the op does all members.

A rule gets, after torch.vmap's own info and in_dims, the arguments of its op, and calls the op as `call`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Call = Callable[..., Any]
InDims = tuple[int | None, ...]
# Results, and where the mapped dimension is in each (None: nowhere).
Mapped = tuple[tuple[Tensor, ...], InDims]

_TENSORS = 12  # tensor arguments of the op forward: q, k, v and nine optional ones


def forward(call: Call, info: Any, in_dims: InDims, *args: Any) -> Mapped:
    size = info.batch_size
    moved, mapped = _in_front(in_dims, args)
    tensors = _fold_inputs(size, moved[:_TENSORS], mapped[:_TENSORS], bias_per_member=False)
    return _unfold(size, *call(*tensors, *moved[_TENSORS:])), (0, 0)


def backward(call: Call, info: Any, in_dims: InDims, *args: Any) -> Mapped:
    size = info.batch_size
    moved, mapped = _in_front(in_dims, args)
    # dout, dlse, (q, k, v), out, lse, (nine optional tensors), numbers
    inputs, inputs_mapped = moved[2:5] + moved[7 : _TENSORS + 4], mapped[2:5] + mapped[7 : _TENSORS + 4]
    bias, sinks, bias_requires_grad = inputs[3], inputs[6], moved[-1]
    if sinks is not None:
        raise NotImplementedError("flash_attn_ext: vmap over the gradient of attention with sinks is not supported")
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

    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        raise NotImplementedError(
            "flash_attn_ext: vmap over packed sequences (cu_seqlens) is not supported; pack the members of the map as "
            "more sequences of one call instead"
        )
    if mapped[6]:
        raise NotImplementedError("flash_attn_ext: vmap over sinks is not supported; use the same for all members")
    if rng_state is not None:
        if not mapped[11]:
            raise NotImplementedError(
                "flash_attn_ext: vmap with dropout needs randomness='different': the members of the map become members "
                "of one batch, and each of those drops elements of its own"
            )
        rng_state = rng_state[0]
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
