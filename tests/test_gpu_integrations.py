"""On a GPU: torch's scaled_dot_product_attention by every road, varlen_attn, and graphs of compiled code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

from flash_attn_ext import attention, reference
from flash_attn_ext.integrations import sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def switched_off_after() -> Iterator[None]:
    yield
    sdpa.disable()
    torch._dynamo.reset()


def qkv(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 4, 130, 64)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_() for _ in range(3)]


def check(results: list[Tensor], inputs: list[Tensor], dout: Tensor) -> None:
    """(out, dq, dk, dv) of causal attention in torch's layout, by the error rule."""
    expected = {}
    for dtype in (torch.float64, inputs[0].dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = reference.attention(*(x.transpose(1, 2) for x in leaves), causal=True, dtype=dtype).transpose(1, 2)
        expected[dtype] = [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]
    for own, exact, low in zip(results, expected[torch.float64], expected[inputs[0].dtype], strict=True):
        bound = reference.error_bound(exact, low, inputs[0].dtype, 3.0)
        assert (own.double() - exact).abs().max().item() <= bound


@pytest.mark.parametrize("by_name", [False, True], ids=["attribute", "imported before"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scaled_dot_product_attention(by_name: bool, compiled: bool) -> None:
    inputs = qkv()
    dout = torch.randn_like(inputs[0])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = imported_by_name if by_name else F.scaled_dot_product_attention
        return function(q, k, v, is_causal=True)

    run = torch.compile(call, fullgraph=True) if compiled else call
    with sdpa.enable(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = run(*inputs)
        gradients = torch.autograd.grad(out, inputs, dout)
        stats = sdpa.stats()
    assert not stats.returned, stats
    assert (stats.kernels, stats.attended) == ((2, 0) if by_name else (0, 0 if compiled else 1)), stats
    check([out, *gradients], inputs, dout)


def test_float32_and_masks_run_here() -> None:
    q, k, v = qkv(torch.float32)
    mask = torch.rand(130, 130, device="cuda") > 0.3
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    with sdpa.enable():
        out = F.scaled_dot_product_attention(q, k, v, mask)
        assert sdpa.stats().attended == 1
        F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert list(sdpa.stats().returned) == ["torch.float64 on cuda"]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_varlen_attn() -> None:
    """torch's own function for packed sequences, through its registry of flash implementations."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    rows = [x.detach().transpose(1, 2).flatten(0, 1).contiguous().requires_grad_() for x in qkv()]
    lengths = torch.tensor([0, 100, 260], dtype=torch.int32, device="cuda")
    expected = reference.attention_varlen(*rows, lengths)
    low = reference.attention_varlen(*rows, lengths, dtype=torch.bfloat16)
    with sdpa.enable():
        out = varlen.varlen_attn(*rows, lengths, lengths, 160, 160)
        out.float().sum().backward()
        stats = sdpa.stats()
        registered = "torch's flash kernels on CUDA, registered as 'fa_ext'" in sdpa.active()
    assert registered == hasattr(torch.nn.attention, "restore_flash_attention_impl")
    assert (stats.kernels, stats.returned) == (2, {})
    assert (out.double() - expected).abs().max() <= reference.error_bound(expected, low, torch.bfloat16, 3.0)
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_max_autotune_with_graphs() -> None:
    """max-autotune records CUDA graphs, forward and backward, for changing inputs of one size."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, causal=True).sin()

    compiled = torch.compile(call, mode="max-autotune", fullgraph=True)
    counters.clear()
    for _ in range(4):
        q, k, v = (x.transpose(1, 2) for x in qkv())
        leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*leaves)
        own = [out.detach().clone(), *torch.autograd.grad(out.float().sum(), leaves)]
        expected = call(*leaves)
        exact = [expected.detach(), *torch.autograd.grad(expected.float().sum(), leaves)]
        for ours, other in zip(own, exact, strict=True):
            torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-2)
    assert counters["stats"]["unique_graphs"] > 0  # it was compiled, while the counters counted
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_second_derivatives() -> None:
    q, k, v = (x.detach().transpose(1, 2)[:, :40].float().requires_grad_() for x in qkv())
    results = []
    for function in (attention, lambda *x: reference.attention(*x, dtype=torch.float32)):
        gradients = torch.autograd.grad(function(q, k, v).sin().sum(), (q, k, v), create_graph=True)
        results.append(torch.autograd.grad(sum(g.sin().sum() for g in gradients), (q, k, v)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
