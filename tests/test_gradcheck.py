"""Gradients of every option against finite differences, in float64: no formula of ours on the other side."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LEAVES, Case
from torch import Tensor

# Several tiles would cost a second per element; the tiles' seams are the matter of the parity tests.
SMALL = Case(batch=2, seqlen_q=4, seqlen_k=6, heads=2, heads_kv=1, head_dim=3, dtype=torch.float64)
OPTIONS = {
    "plain": SMALL,
    "one head": SMALL.but(batch=1, heads=1),
    "causal": SMALL.but(window_right=0),
    "rows that see nothing": SMALL.but(window_right=0, seqlen_q=6, seqlen_k=4),
    "window": SMALL.but(window_left=2, window_right=1),
    "values wider": SMALL.but(head_dim_v=5),
    "negative scale": SMALL.but(scale=-0.7),
    "scale 0": SMALL.but(scale=0.0),
    "softcap": SMALL.but(softcap=1.5),
    "alibi": SMALL.but(alibi="bh"),
    "bias": SMALL.but(bias="bhqk"),
    "bias, broadcast rows": SMALL.but(bias="bh1k"),
    "bias, broadcast batch and columns": SMALL.but(bias="1hq1"),
    "bias, one number": SMALL.but(bias="1111"),
    "mask": SMALL.but(mask="bhqk"),
    "sinks": SMALL.but(sinks=True),
    "sinks and masked rows": SMALL.but(sinks=True, mask="b1q1", mask_density=0.5),
    "dropout": SMALL.but(dropout_p=0.4),
    "used lengths": SMALL.but(used_q=(4, 2), used_k=(0, 5)),
    "packed": SMALL.but(lengths_q=(3, 0, 2), lengths_k=(2, 1, 4), tail=1, window_right=0),
    "everything": SMALL.but(
        window_left=3, window_right=1, softcap=2.0, alibi="h", bias="1hqk", mask="b11k", sinks=True, dropout_p=0.3
    ),
}


@pytest.mark.cpu
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(device: str, case: Case) -> None:
    inputs = {name: None if t is None else without_nan(t) for name, t in case.make().items()}
    names = [name for name in LEAVES if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = case.call(inputs | dict(zip(names, given, strict=True)))
        # -inf minus -inf is no finite difference; the gradient of a row that sees nothing is 0.
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


def without_nan(t: Tensor) -> Tensor:
    return t.nan_to_num(0.0) if t.is_floating_point() else t
