"""Strides change where the numbers lie, and nothing else: the results keep their bits."""

from __future__ import annotations

import pytest
import torch
from cases import DOUT_LAYOUTS, LAYOUTS, Case, arrange, check

import flash_attn_ext

CASES = (
    Case(batch=2, seqlen_q=40, seqlen_k=75, window_right=0),
    Case(head_dim=17, head_dim_v=9, softcap=4.0, bias="1h1k", sinks=True),
    Case(head_dim=64, seqlen_q=1, seqlen_k=130),
    Case(lengths_q=(20, 0, 13), lengths_k=(33, 4, 70), tail=2, alibi="h"),
)


def assert_same_bits(case: Case, other: Case, device: str) -> None:
    expected, got = case.run_ours(case.make(device)), other.run_ours(other.make(device))
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


@pytest.mark.one_kernel
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("contiguous", "expanded")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_of_inputs(device: str, dtype: torch.dtype, case: Case, layout: str) -> None:
    case = case.but(dtype=dtype)
    assert_same_bits(case, case.but(layout=layout), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_meets_the_oracle(device: str, dtype: torch.dtype, layout: str) -> None:
    """Whichever kernel a layout leads to."""
    check(Case(batch=2, seqlen_q=140, seqlen_k=275, window_right=0, layout=layout, dtype=dtype), device)


@pytest.mark.one_kernel
@pytest.mark.parametrize("layout", [layout for layout in DOUT_LAYOUTS if layout not in ("contiguous", "scalar")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_of_incoming_gradient(device: str, dtype: torch.dtype, case: Case, layout: str) -> None:
    case = case.but(dtype=dtype)
    assert_same_bits(case, case.but(dout_layout=layout), device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expanded_heads(device: str, dtype: torch.dtype, case: Case) -> None:
    """Keys and values with stride 0 over the heads, and an incoming gradient with no strides at all."""
    check(case.but(dtype=dtype, layout="expanded", dout_layout="scalar"), device)


def test_any_stride_of_a_single_row(device: str, dtype: torch.dtype) -> None:
    """That of the last row of a fused projection with a number for something else behind q, k and v."""
    fused = torch.randn(1, 9, 3 * 2 * 64 + 1, dtype=dtype, device=device)
    q, k, v = (fused[..., i * 128 : (i + 1) * 128].unflatten(-1, (2, 64)) for i in range(3))
    expected = flash_attn_ext.attention(q[:, -1:].contiguous(), k, v)
    assert torch.equal(flash_attn_ext.attention(q[:, -1:], k, v), expected)


@pytest.mark.one_kernel
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "head"])
def test_expanded(device: str, dtype: torch.dtype, dim: int) -> None:
    """Stride 0 over any dimension, of all three inputs, gives what a copy gives."""
    shape = [2, 37, 3, 24]
    shape[dim] = 1
    sizes = [2, 37, 3, 24]
    inputs = [torch.randn(shape, dtype=dtype, device=device).expand(sizes) for _ in range(3)]
    dout = torch.randn(sizes, dtype=dtype, device=device)

    def run(*given: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in given]
        out = flash_attn_ext.attention(*leaves, causal=True)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    for got, expected in zip(run(*inputs), run(*(t.contiguous() for t in inputs)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["heads_first", "sliced", "last_strided"])
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_layout_of_score_matrices(device: str, dtype: torch.dtype, name: str, layout: str) -> None:
    """Bias and mask may have any strides, the last one included."""
    case = Case(dtype=dtype, bias="bhqk", mask="bhqk", window_right=0)
    inputs = case.make(device)
    expected = case.run_ours(inputs)
    t = inputs[name]
    inputs[name] = arrange(t.float(), layout) > 0.5 if name == "mask" else arrange(t, layout)
    if name == "mask":  # comparisons do not keep strides
        larger = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=torch.bool, device=device)
        inputs[name] = larger[..., ::2].copy_(t) if layout == "last_strided" else arrange(t, "heads_first")
    got = case.run_ours(inputs)
    for result, value in expected.items():
        assert torch.equal(got[result], value), result


@pytest.mark.one_kernel
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_unaligned_storage(device: str, dtype: torch.dtype, offset: int) -> None:
    """Data that starts at any element of its storage: no kernel may count on alignment."""
    case = Case(seqlen_q=33, seqlen_k=65, head_dim=64, dtype=dtype)
    inputs = case.make(device)
    expected = case.run_ours(inputs)
    for name in ("q", "k", "v", "dout"):
        t = inputs[name]
        storage = torch.empty(t.numel() + offset, dtype=dtype, device=device)
        inputs[name] = storage[offset:].view(t.shape).copy_(t)
    got = case.run_ours(inputs)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_inputs_stay_as_they_were(device: str, dtype: torch.dtype) -> None:
    """No kernel writes into what it was given, neither into the tensors nor into the storage around them."""
    case = Case(layout="sliced", dout_layout="sliced", bias="bhqk", mask="b1qk", sinks=True, dtype=dtype)
    inputs = {name: t for name, t in case.make(device).items() if t is not None}
    no_bytes = torch.empty(0, dtype=torch.uint8, device=device)
    storages = {name: no_bytes.clone().set_(t.untyped_storage()) for name, t in inputs.items()}
    before = {name: storage.clone() for name, storage in storages.items()}
    case.run_ours(case.make(device) | inputs)
    for name, storage in storages.items():
        assert torch.equal(storage, before[name]), name
