"""FLOP counts of attention for torch.utils.flop_counter, registered when the package is imported.

A pair of a row and a key that it sees takes head_dim multiplications and additions for its score and head_dim_v for its
share of the values; the backward takes the score again, and one product for each of dq, dk, dv and dp. Counted are the
pairs within the window (causal order, sliding window) and within the lengths, exactly, wherever tensors have values:
lengths on a device are read, which waits for it. Where they have none (FakeTensor, meta), packed sequences count as
equally long and used lengths as full. Keys that a mask or a bias hides count: their products are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from .ops import OPTIONAL_TENSORS, ops


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> int:
    """How many (row, key) pairs of one sequence are within the window: i + shift - left <= j <= i + shift + right."""
    row, furthest = torch.arange(seqlen_q, dtype=torch.int64), seqlen_q + seqlen_k
    shift = seqlen_k - seqlen_q
    # A side beyond all rows and keys is no limit, and the sums below hold no number that is much larger.
    left, right = (None if x is None else max(-furthest, min(x, furthest)) for x in (left, right))
    first = torch.zeros_like(row) if left is None else (row + shift - left).clamp(0, seqlen_k)
    end = torch.full_like(row, seqlen_k) if right is None else (row + shift + right + 1).clamp(0, seqlen_k)
    return int((end - first).clamp(min=0).sum())


def _pairs(q: Tensor, k: Tensor, *options: Any) -> int:
    """Visible pairs of all sequences, of one head. options: the arguments of the op forward after q, k and v."""
    given = dict(zip(OPTIONAL_TENSORS, options, strict=False))
    left, right = options[len(OPTIONAL_TENSORS) + 2 : len(OPTIONAL_TENSORS) + 4]
    lengths_q, lengths_k = (
        _lengths(x, given[f"cu_seqlens_{side}"], given[f"seqused_{side}"]) for x, side in ((q, "q"), (k, "k"))
    )
    with torch._C._DisableTorchDispatch():  # what counts here is no part of what is counted
        return sum(visible_pairs(m, n, left, right) for m, n in zip(lengths_q, lengths_k, strict=True))


def _lengths(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> list[int]:
    """Rows in use of each sequence."""
    if cu_seqlens is None:
        batch, seqlen = x.shape[:2]
        lengths = [seqlen] * batch
    elif _has_values(cu_seqlens):
        lengths = cu_seqlens.diff().tolist()
    else:
        batch = cu_seqlens.shape[0] - 1
        lengths = [(len(x) + i) // batch for i in range(batch)]
    if seqused is not None and _has_values(seqused):
        lengths = [max(0, min(length, used)) for length, used in zip(lengths, seqused.tolist(), strict=True)]
    return lengths


def _has_values(x: Tensor) -> bool:
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any, out_val: Any = None) -> int:
    return 2 * _pairs(q, k, *options) * q.shape[-2] * (q.shape[-1] + v.shape[-1])


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
    out_val: Any = None,
) -> int:
    return 2 * _pairs(q, k, *options) * q.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


register_flop_formula(ops.forward, get_raw=True)(_forward)
register_flop_formula(ops.backward, get_raw=True)(_backward)
