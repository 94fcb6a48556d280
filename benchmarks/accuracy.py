"""Error against attention in float64, on the first key head and its query heads."""

from collections.abc import Iterator
from typing import Any

import torch
from candidate import Inputs, Prepared
from candidates import Candidate, flash_options
from stopwatch import significant
from suites import Case
from torch import Tensor

from flash_attn_ext import reference

NAMES = ("out", "dq", "dk", "dv", "dbias")
MOST_SCORES = 1 << 26  # of the float64 matrix at a time: the reference holds about a dozen such matrices
WRONG = 0.1  # an error of this share of the largest value is no rounding: 16-bit candidates stay below a fifth of it


class WrongResultError(RuntimeError):
    """A candidate computed something else."""


def expected_results(case: Case, inputs: Inputs) -> list[Tensor]:
    """Output and gradients in float64: of the first member of the batch, or of all where one bias serves them all.

    None with dropout: everyone draws bits of their own.
    """
    if case.dropout:
        return []
    members, heads = slice(None if case.bias == "heads" else 1), slice(case.heads // case.heads_kv)
    q, dout = (x[members, :, heads].double() for x in (inputs.q, inputs.dout))
    k, v = (x[members, :, :1].double() for x in (inputs.k, inputs.v))
    bias = None if inputs.bias is None else inputs.bias[members, heads].double()
    mask = None if inputs.mask is None else inputs.mask[members]
    options = flash_options(case, inputs, heads)
    if not case.lengths:
        return exact(case, q, k, v, dout, bias, mask, options)
    ends = torch.tensor(case.lengths).cumsum(0).tolist()
    sequences = [slice(end - length, end) for end, length in zip(ends, case.lengths, strict=True)]
    parts = [exact(case, *(x[:, rows] for x in (q, k, v, dout)), None, None, options) for rows in sequences]
    return [torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)]


def exact(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    options: dict[str, Any],
) -> list[Tensor]:
    """out, dq, dk, dv and dbias, where there is one, some rows at a time: the gradients of all rows add up."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias) if x is not None]
    q, k, v = leaves[:3]
    bias = None if bias is None else leaves[3]
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    out = []
    size = max(1, MOST_SCORES // (q.shape[0] * q.shape[2] * seqlen_k))
    for rows in chunks(seqlen_q, seqlen_q if case.alibi else size):  # ALiBi measures from the last of all rows
        # The reference's diagonal ends at the last key: give it as many as the last of these rows sees.
        keys = slice(max(0, rows.stop + seqlen_k - seqlen_q) if case.causal else seqlen_k)
        part = reference.attention(
            q[:, rows],
            k[:, keys],
            v[:, keys],
            bias=None if bias is None else bias[:, :, rows, keys],
            mask=None if mask is None else mask[:, :, rows, keys],
            **options,
        )
        part.backward(dout[:, rows])
        out.append(part.detach())
    return [torch.cat(out, 1), *(leaf.grad for leaf in leaves)]


def chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def errors(candidate: Candidate, case: Case, prepared: Prepared, expected: list[Tensor]) -> dict[str, dict[str, float]]:
    """Differences from float64, per tensor: the largest absolute one, and the root mean square of all of them over that
    of the tensor. One of millions of elements decides the first, so that candidates that round alike differ in it by
    chance. Raises WrongResultError where the largest is no rounding."""
    with candidate.context():
        actual = (prepared.forward(), *prepared.backward())
    result: dict[str, dict[str, float]] = {"error": {}, "rms_error": {}}
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        if name == "dbias":
            a = a[: e.shape[0], : e.shape[1]]
        else:
            a = candidate.from_native(a, bool(case.lengths))[: e.shape[0], :, : e.shape[2]]
        difference = a.double() - e
        largest = float(difference.abs().max())
        if not largest <= WRONG * float(e.abs().max()):  # NaN is wrong, too
            raise WrongResultError(f"wrong result: {name} is off by {largest:.2g}")
        result["error"][name] = significant(largest, 3)
        norm = float(e.norm())
        result["rms_error"][name] = significant(float(difference.norm()) / norm, 4) if norm > 0 else 0.0
    return result
