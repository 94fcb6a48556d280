"""Packed sequences of different lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch
from cases import Case, check

import flash_attn_ext

LENGTHS = {
    "mixed": ((17, 1, 64, 33), (40, 90, 64, 3)),
    "empty sequences": ((0, 12, 0, 0, 5), (7, 0, 0, 20, 31)),
    "one": ((65,), (129,)),
    "many short": ((1, 2, 3) * 12, (3, 1, 2) * 12),
    "longest last": ((2, 3, 300), (2, 3, 300)),
    "longest first": ((300, 3, 2), (257, 3, 2)),
    "a token each": ((1, 1, 0, 1, 1, 2, 1, 1), (3, 700, 300, 256, 0, 257, 1, 513)),
}
OPTIONS = {
    "plain": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 20, "window_right": 3},
    "bias": {"bias": "bhqk", "mask": "11qk"},
    "broadcast bias": {"bias": "b11k", "alibi": "bh"},
    "sinks": {"sinks": True, "softcap": 5.0, "window_right": 0},
    "dropout": {"dropout_p": 0.4, "window_right": 0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed(device: str, dtype: torch.dtype, lengths: tuple, options: dict) -> None:
    lengths_q, lengths_k = lengths
    check(Case(lengths_q=lengths_q, lengths_k=lengths_k, head_dim=16, dtype=dtype, **options), device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_of_no_sequence(device: str, dtype: torch.dtype, options: dict) -> None:
    """Rows after the last sequence hold NaN: they give out 0, lse -inf and gradients 0, and reach nothing else."""
    case = Case(lengths_q=(9, 40), lengths_k=(50, 21), tail=5, dtype=dtype, **options)
    result = case.run_ours(case.make(device))
    assert not result["out"][-5:].any()
    assert (result["lse"][:, -5:] == -math.inf).all()
    for name in ("dq", "dk", "dv"):
        assert not result[name][-5:].any(), name
    check(case, device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_used_lengths(device: str, dtype: torch.dtype, options: dict) -> None:
    """seqused shortens packed sequences, and the diagonal follows; the rest holds NaN and is never read."""
    case = Case(lengths_q=(30, 40, 8), lengths_k=(50, 21, 16), used_q=(30, 7, 0), used_k=(49, 21, 9), dtype=dtype)
    check(case.but(**options), device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_used_lengths_dense(device: str, dtype: torch.dtype, options: dict) -> None:
    case = Case(batch=4, seqlen_q=35, seqlen_k=70, used_q=(35, 0, 7, 33), used_k=(1, 70, 0, 64), dtype=dtype)
    check(case.but(**options), device)


@pytest.mark.parametrize("options", [{"window_right": 0}, {"alibi": "h", "window_left": 100}], ids=["causal", "alibi"])
def test_used_lengths_of_several_blocks(device: str, dtype: torch.dtype, options: dict) -> None:
    case = Case(batch=3, seqlen_q=210, seqlen_k=330, used_q=(210, 3, 81), used_k=(330, 200, 90), head_dim=128)
    check(case.but(dtype=dtype, **options), device)


def packed(device: str, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    starts = torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(sum(lengths), 2, 32, generator=generator).to(device) for _ in range(3))
    return q, k, v, starts


def test_keys_follow_queries_by_default(device: str) -> None:
    q, k, v, starts = packed(device, (12, 0, 30))
    expected = flash_attn_ext.attention_varlen(q, k, v, starts, starts, causal=True)
    assert torch.equal(flash_attn_ext.attention_varlen(q, k, v, starts, causal=True), expected)


@pytest.mark.parametrize(("max_q", "max_k"), [(30, None), (None, 30), (30, 30), (42, 1000)])
def test_length_hints_change_nothing(device: str, max_q: int | None, max_k: int | None) -> None:
    q, k, v, starts = packed(device, (12, 0, 30))
    expected = flash_attn_ext.attention_varlen(q, k, v, starts, causal=True)
    got = flash_attn_ext.attention_varlen(q, k, v, starts, causal=True, max_seqlen_q=max_q, max_seqlen_k=max_k)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("head_dim", [32, 128])
def test_sequences_do_not_see_each_other(device: str, dtype: torch.dtype, head_dim: int) -> None:
    """Another sequence full of infinities changes no bit of its neighbours."""
    lengths = (20, 133, 95)
    case = Case(lengths_q=lengths, lengths_k=lengths, head_dim=head_dim, dtype=dtype, window_right=0)
    inputs = case.make(device)
    expected = case.run_ours(inputs)
    for name in ("q", "k", "v", "dout"):
        inputs[name][20:153] = math.inf
    got = case.run_ours(inputs)
    for name in ("out", "dq", "dk", "dv"):
        for rows in (slice(0, 20), slice(153, 248)):
            assert torch.equal(got[name][rows], expected[name][rows]), name


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu_time(lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype, gradients: bool) -> float:
    starts_q, starts_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, k = torch.randn(sum(lengths_q), 8, 16).to(dtype), torch.randn(sum(lengths_k), 1, 16).to(dtype)
    q, k = q.requires_grad_(gradients), k.requires_grad_(gradients)
    start = time.process_time()
    out = flash_attn_ext.attention_varlen(q, k, k, starts_q, starts_k, window_size=(2, 0))
    if gradients:
        torch.autograd.grad(out, (q, k), torch.ones_like(out))
    return time.process_time() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gradients", [False, True], ids=["decode", "backward"])
def test_one_long_sequence_does_not_slow_down_the_others(gradients: bool, dtype: torch.dtype, one_thread: None) -> None:
    """On the CPU many short packed sequences and a long one take the time that they take apart."""
    short, long = [1] * 10000, [40000 if gradients else 131072]
    long_q = long if gradients else [1]
    apart = cpu_time(short, short, dtype, gradients) + cpu_time(long_q, long, dtype, gradients)
    assert cpu_time(short + long_q, short + long, dtype, gradients) <= 5 * apart + 0.5
