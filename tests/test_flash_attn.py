"""The functions with flash-attn's names: its signatures, and its results by the specification in reference.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import InputError, pad_input, reference, unpad_input

# Sums of under 100 float64 terms of order 1, added up in two orders, differ by less than 1e-13.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {OPTIONS}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
}

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_KV, HEAD_DIM = 2, 19, 27, 4, 2, 16
CU_SEQLENS_Q, CU_SEQLENS_K = (0, 7, 7, 19, 36), (0, 11, 30, 30, 52)
LONGEST_Q, LONGEST_K = 17, 22

# What the function is given, and what that means to the specification.
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "scale": ({"softmax_scale": 0.4}, {"softmax_scale": 0.4}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (5, 3)}, {"window_size": (5, 3)}),
    "left window, causal": ({"window_size": (5, 3), "causal": True}, {"window_size": (5, -1), "causal": True}),
    "any negative side is no limit": ({"window_size": (-7, 3)}, {"window_size": (-1, 3)}),
    "softcap": ({"softcap": 3.0}, {"softcap": 3.0}),
    "negative softcap is off": ({"softcap": -1.0}, {}),
    "alibi": ({"alibi_slopes": "slopes", "causal": True}, {"alibi_slopes": "slopes", "causal": True}),
    "deterministic": ({"deterministic": True}, {}),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def int32(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_slopes(options: dict[str, Any]) -> dict[str, Any]:
    slopes = torch.linspace(0.05, 0.4, HEADS)
    return {name: slopes if value is not None and value == "slopes" else value for name, value in options.items()}


def close(ours: Any, expected: Any, leaves: tuple[Tensor, ...], incoming: Tensor) -> None:
    torch.testing.assert_close(ours, expected, **CLOSE)
    gradients = (torch.autograd.grad(out, leaves, incoming, retain_graph=True) for out in (ours, expected))
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_attns(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn_ext, name)).parameters.values()
    written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert ", ".join(written) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("choice", CHOICES)
def test_dense(choice: str) -> None:
    given, meant = (with_slopes(options) for options in CHOICES[choice])
    q = normal(BATCH, SEQLEN_Q, HEADS, HEAD_DIM, seed=1).requires_grad_()
    kv = normal(BATCH, SEQLEN_K, 2, HEADS_KV, HEAD_DIM, seed=2).requires_grad_()
    expected = reference.attention(q, kv[:, :, 0], kv[:, :, 1], **meant)
    incoming = normal(BATCH, SEQLEN_Q, HEADS, HEAD_DIM, seed=3)
    out = flash_attn_ext.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **given)
    close(out, expected, (q, kv), incoming)
    close(flash_attn_ext.flash_attn_kvpacked_func(q, kv, **given), expected, (q, kv), incoming)


@pytest.mark.parametrize("choice", CHOICES)
def test_dense_qkvpacked(choice: str) -> None:
    given, meant = (with_slopes(options) for options in CHOICES[choice])
    qkv = normal(BATCH, SEQLEN_Q, 3, HEADS, HEAD_DIM).requires_grad_()
    expected = reference.attention(*qkv.unbind(2), **meant)
    incoming = normal(BATCH, SEQLEN_Q, HEADS, HEAD_DIM, seed=3)
    close(flash_attn_ext.flash_attn_qkvpacked_func(qkv, **given), expected, (qkv,), incoming)


@pytest.mark.parametrize("choice", CHOICES)
def test_varlen(choice: str) -> None:
    given, meant = (with_slopes(options) for options in CHOICES[choice])
    q = normal(CU_SEQLENS_Q[-1], HEADS, HEAD_DIM, seed=1).requires_grad_()
    kv = normal(CU_SEQLENS_K[-1], 2, HEADS_KV, HEAD_DIM, seed=2).requires_grad_()
    cu_seqlens = int32(CU_SEQLENS_Q), int32(CU_SEQLENS_K)
    lengths = (*cu_seqlens, LONGEST_Q, LONGEST_K)
    expected = reference.attention_varlen(q, kv[:, 0], kv[:, 1], *cu_seqlens, **meant)
    incoming = normal(*q.shape, seed=3)
    close(flash_attn_ext.flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], *lengths, **given), expected, (q, kv), incoming)
    close(flash_attn_ext.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **given), expected, (q, kv), incoming)


@pytest.mark.parametrize("choice", CHOICES)
def test_varlen_qkvpacked(choice: str) -> None:
    given, meant = (with_slopes(options) for options in CHOICES[choice])
    qkv = normal(CU_SEQLENS_Q[-1], 3, HEADS, HEAD_DIM).requires_grad_()
    cu_seqlens = int32(CU_SEQLENS_Q)
    expected = reference.attention_varlen(*qkv.unbind(1), cu_seqlens, **meant)
    out = flash_attn_ext.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, LONGEST_Q, **given)
    close(out, expected, (qkv,), normal(*out.shape, seed=3))


def test_on_every_device(device: str, dtype: torch.dtype) -> None:
    q, k, v = (normal(2, 33, heads, 32, seed=heads).to(device, dtype) for heads in (4, 2, 2))
    exact = reference.attention(q, k, v, causal=True)
    low = torch.float32 if dtype == torch.float64 else dtype
    bound = reference.error_bound(exact, reference.attention(q, k, v, causal=True, dtype=low), dtype)
    cu_seqlens = torch.tensor([0, 33, 66], dtype=torch.int32, device=device)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    varlen = flash_attn_ext.flash_attn_varlen_func(*packed, cu_seqlens, cu_seqlens, 33, 33, causal=True)
    for out in (flash_attn_ext.flash_attn_func(q, k, v, causal=True), varlen.view_as(exact)):
        assert out.dtype == dtype
        assert (out - exact).abs().max().item() <= bound


def test_options_are_positional_in_flash_attns_order() -> None:
    q, k, v = (normal(1, 9, 2, 8, seed=seed) for seed in range(3))
    slopes = torch.tensor([0.1, 0.3])
    out = flash_attn_ext.flash_attn_func(q, k, v, 0.0, 0.7, True, (4, 0), 5.0, slopes, True, False)
    expected = reference.attention(
        q, k, v, softmax_scale=0.7, causal=True, window_size=(4, 0), softcap=5.0, alibi_slopes=slopes
    )
    torch.testing.assert_close(out, expected, **CLOSE)


def test_return_attn_probs_without_dropout() -> None:
    q, k, v = (normal(2, 9, 2, 8, seed=seed) for seed in range(3))
    out, lse, s_dmask = flash_attn_ext.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected_out, expected_lse = reference.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), (expected_out, expected_lse), **CLOSE)
    assert s_dmask.numel() == 0


def attend_by(s_dmask: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """What the output has to be: kept probabilities (positive) over the rest, times v."""
    kept = s_dmask.clamp(min=0.0) / (1 - dropout_p)
    return torch.einsum("hij,jhd->ihd", kept, v.repeat_interleave(s_dmask.shape[0] // v.shape[1], 1))


def test_return_attn_probs_tells_what_was_dropped() -> None:
    """600 keys: more columns than one product with an identity can give."""
    q, k, v = normal(2, 40, 4, 8, seed=1), normal(2, 600, 2, 8, seed=2), normal(2, 600, 2, 8, seed=3)
    out, lse, s_dmask = flash_attn_ext.flash_attn_func(q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True)
    assert lse.shape == (2, 4, 40)
    assert s_dmask.shape == (2, 4, 40, 600)
    probabilities = s_dmask.abs().sum(-1)
    torch.testing.assert_close(probabilities, torch.ones_like(probabilities), **CLOSE)
    for b in range(2):
        torch.testing.assert_close(attend_by(s_dmask[b], v[b], 0.3), out[b], **CLOSE)
    dropped = (s_dmask < 0).sum().item() / (s_dmask != 0).sum().item()
    assert abs(dropped - 0.3) < 6 * (0.3 * 0.7 / s_dmask.count_nonzero().item()) ** 0.5


def test_return_attn_probs_of_packed_sequences() -> None:
    total_q, total_k = CU_SEQLENS_Q[-1] + 3, CU_SEQLENS_K[-1] + 2  # rows that belong to no sequence
    q, k, v = normal(total_q, 4, 8, seed=1), normal(total_k, 2, 8, seed=2), normal(total_k, 2, 8, seed=3)
    lengths = int32(CU_SEQLENS_Q), int32(CU_SEQLENS_K), LONGEST_Q, LONGEST_K
    out, lse, s_dmask = flash_attn_ext.flash_attn_varlen_func(q, k, v, *lengths, 0.3, return_attn_probs=True)
    assert lse.shape == (4, total_q)
    assert s_dmask.shape == (len(CU_SEQLENS_Q) - 1, 4, LONGEST_Q, LONGEST_K)
    for b, (i0, i1, j0, j1) in enumerate(
        zip(CU_SEQLENS_Q, CU_SEQLENS_Q[1:], CU_SEQLENS_K, CU_SEQLENS_K[1:], strict=False)
    ):
        expected = attend_by(s_dmask[b, :, : i1 - i0, : j1 - j0], v[j0:j1], 0.3)
        torch.testing.assert_close(out[i0:i1], expected, **CLOSE)
        assert s_dmask[b, :, i1 - i0 :].count_nonzero() == 0
        assert s_dmask[b, :, :, j1 - j0 :].count_nonzero() == 0


def test_paged_keys_are_refused() -> None:
    q = normal(5, 2, 8)
    cu_seqlens = int32((0, 5))
    with pytest.raises(InputError, match=r"block_table must be None.*\n.*dropout_p must"):  # with all that is wrong
        flash_attn_ext.flash_attn_varlen_func(
            q, q, q, cu_seqlens, cu_seqlens, 5, 5, dropout_p=2.0, block_table=torch.zeros(1, 1, dtype=torch.int32)
        )


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("flash_attn_qkvpacked_func", (torch.zeros(2, 5, 2, 4, 8),), r"qkv must be a tensor of shape \(batch, seqlen"),
        ("flash_attn_qkvpacked_func", ([1],), "got list"),
        (
            "flash_attn_kvpacked_func",
            (torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 4, 8)),
            "kv must be a tensor of shape",
        ),
        ("flash_attn_func", (torch.zeros(5, 4, 8),) * 3, r"flash_attn_func: 3 constraints are not met"),
        ("flash_attn_func", (*(torch.zeros(1, 5, 4, 8),) * 3, 0.0, None, False, 5), "window_size must be two integers"),
        ("flash_attn_func", (*(torch.zeros(1, 5, 4, 8),) * 3, "much"), "dropout_p must be a number, got str 'much'"),
        ("flash_attn_func", (*(torch.zeros(1, 5, 4, 8),) * 2, None), r"v must be a torch\.Tensor, got None"),
    ],
)
def test_bad_arguments_are_refused(function: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(flash_attn_ext, function)(*arguments)


def test_unpad_and_pad() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])  # padding may lie anywhere
    x = normal(3, 4, 2, 5).requires_grad_()
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert rows.shape == (6, 2, 5)
    assert indices.tolist() == [0, 1, 2, 8, 10, 11]
    assert cu_seqlens.tolist() == [0, 3, 3, 6]
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert max_seqlen == 3
    assert seqused.tolist() == [3, 0, 3]
    padded = pad_input(rows, indices, 3, 4)
    assert torch.equal(padded, x * mask[..., None, None])
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(gradient, mask[..., None, None].expand_as(x).to(x))


def test_unpad_keeps_room_for_unused_tokens() -> None:
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    rows, _, cu_seqlens, max_seqlen, seqused = unpad_input(normal(2, 4, 3), mask, unused)
    assert (len(rows), max_seqlen) == (7, 4)
    assert cu_seqlens.tolist() == [0, 3, 7]
    assert seqused.tolist() == [2, 1]


def test_unpad_of_nothing() -> None:
    rows, _, cu_seqlens, max_seqlen, _ = unpad_input(normal(0, 4, 3), torch.ones(0, 4))
    assert (len(rows), cu_seqlens.tolist(), max_seqlen) == (0, [0], 0)


def test_pad_and_unpad_refuse_other_shapes() -> None:
    with pytest.raises(InputError, match="attention_mask must have shape"):
        unpad_input(normal(2, 4, 3), torch.ones(2, 5))
    with pytest.raises(InputError, match="indices must have shape"):
        pad_input(normal(4, 3), torch.arange(5), 2, 4)


@pytest.mark.parametrize("dropout_p", [1, 1.0, torch.tensor(1.0)])
def test_dropped_probabilities_for_every_kind_of_number(dropout_p: Any) -> None:
    q = torch.randn(1, 5, 2, 8)
    dropped = flash_attn_ext.flash_attn_func(q, q, q, dropout_p, return_attn_probs=True)[2]
    assert dropped.shape == (1, 2, 5, 5)
    torch.testing.assert_close(-dropped.sum(-1), torch.ones(1, 2, 5))


def test_dropped_probabilities_without_the_longest_lengths() -> None:
    q, starts = torch.randn(10, 2, 8), torch.tensor([0, 4, 10], dtype=torch.int32)
    found = []
    for longest in (6, None):
        torch.manual_seed(0)
        call = (q, q, q, starts, starts, longest, longest, 0.5)
        found.append(flash_attn_ext.flash_attn_varlen_func(*call, return_attn_probs=True)[2])
    assert found[0].shape == (2, 2, 6, 6)
    assert torch.equal(*found)
