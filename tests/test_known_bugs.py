"""Bugs that well-known attention kernels have had: one test each, named after what went wrong.

The public thread is in the docstring: FA flash-attention, PT pytorch, CF cudnn-frontend, XF xformers, HF transformers.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cases import EXP_ERROR, Case, check

import flash_attn_ext
from flash_attn_ext import reference


def on_cuda_only(device: str, why: str) -> None:
    if device != "cuda":
        pytest.skip(why)


def gradients(out: torch.Tensor, *leaves: torch.Tensor, dout: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, leaves, torch.ones_like(out) if dout is None else dout)


@pytest.mark.ranges
def test_nan_from_huge_inputs(device: str, dtype: torch.dtype) -> None:
    """PT#121558: q = k = v = 133120 in bfloat16 gave NaN."""
    value = 60000.0 if dtype == torch.float16 else 133120.0
    q = torch.full((1, 1, 1, 64), value, dtype=dtype, device=device, requires_grad=True)
    out = flash_attn_ext.attention(q, q, q)
    assert torch.equal(out, q)
    assert gradients(out, q)[0].isfinite().all()


def test_nan_in_dq_of_one_row_and_key(device: str, dtype: torch.dtype) -> None:
    """FA#334: batch, length and heads of 1 with head_dim 16 gave NaN in dq."""
    check(Case(batch=1, seqlen_q=1, seqlen_k=1, heads=1, heads_kv=1, head_dim=16, dtype=dtype), device)


def test_nan_in_dq_of_packed_rows_that_see_nothing(device: str, dtype: torch.dtype) -> None:
    """FA#443: causal, cu_seqlens_q = [0, 76, 110, 256] against one key each gave NaN in dq."""
    case = Case(lengths_q=(76, 34, 146), lengths_k=(1, 1, 1), heads=1, heads_kv=1, window_right=0, dtype=dtype)
    check(case, device)


def test_biased_rounding_where_maxima_repeat(device: str) -> None:
    """FA#2322: equal maxima made P exactly 1 several times a row, and rounding to bfloat16 went one way."""
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(2, 256, 4, 64, generator=generator).bfloat16().to(device) for _ in range(2))
    k = k[:, torch.arange(256) % 16]  # every key 16 times
    v = (-1 - torch.rand(2, 256, 4, 64, generator=generator)).bfloat16().to(device)
    expected = reference.attention(q, k, v)
    error = (flash_attn_ext.attention(q, k, v).double() - expected).mean(-1).flatten()  # of one sign in a row, if any
    allowed = 5 * error.std() / math.sqrt(error.numel()) + EXP_ERROR * expected.abs().mean()
    assert error.mean().abs() < allowed


@pytest.mark.ranges
def test_nan_from_a_mask_of_finite_minimum(device: str, dtype: torch.dtype) -> None:
    """PT#109517: finfo.min as the bias of the first 128 keys overflowed to -inf."""
    case = Case(batch=1, heads=2, seqlen_q=441, seqlen_k=441, head_dim=64, dtype=dtype, bias="b11k")
    inputs = case.make(device)
    inputs["bias"].zero_()[..., :128] = torch.finfo(dtype).min
    keys = [inputs[name][:, 128:] for name in "kv"]
    out = flash_attn_ext.attention(inputs["q"], inputs["k"], inputs["v"], bias=inputs["bias"])
    expected = reference.attention(inputs["q"], *keys)
    low_precision = reference.attention(inputs["q"], *keys, dtype=torch.float32 if dtype == torch.float64 else dtype)
    assert (out.double() - expected).abs().max() <= reference.error_bound(expected, low_precision, dtype, 2.0)


def test_nan_from_a_band_of_infinite_bias(device: str, dtype: torch.dtype) -> None:
    """PT#127055: triu(-inf, 1) + tril(-inf, -10) at length 640, whole tiles of -inf, gave NaN."""
    q, k, v = (torch.randn(1, 640, 1, 32, dtype=dtype, device=device) for _ in range(3))
    hidden = torch.full((640, 640), -math.inf, dtype=dtype, device=device)
    out = flash_attn_ext.attention(q, k, v, bias=hidden.triu(1).nan_to_num(0, neginf=-math.inf) + hidden.tril(-10))
    expected = flash_attn_ext.attention(q, k, v, window_size=(9, 0))
    # The same rows in tiles of other columns: twice the rounding of the dtype, of values of order 1.
    assert (out - expected).abs().max() <= 4 * torch.finfo(dtype).eps * v.abs().max()


def test_nan_from_rows_without_keys(device: str, dtype: torch.dtype) -> None:
    """PT#103963: rows that are False in the whole mask gave NaN."""
    q, k, v = (torch.randn(2, 40, 2, 16, dtype=dtype, device=device).requires_grad_() for _ in range(3))
    mask = torch.ones(40, 40, dtype=torch.bool, device=device)
    mask[7:30] = False
    out, lse = flash_attn_ext.attention(q, k, v, mask=mask, return_lse=True)
    assert not out[:, 7:30].any()
    assert (lse[..., 7:30] == -math.inf).all()
    dq, dk, dv = gradients(out, q, k, v)
    assert not dq[:, 7:30].any()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


def test_backward_hangs_on_empty_sequences(device: str, dtype: torch.dtype) -> None:
    """FA#1254: lengths q = [0, 0, 1023], k = [0, 1, 2045]."""
    check(Case(lengths_q=(0, 0, 1023), lengths_k=(0, 1, 2045), heads=1, heads_kv=1, head_dim=16, dtype=dtype), device)


@pytest.mark.parametrize("shape_q", [(2, 5, 3, 8), (0, 5, 3, 8), (2, 5, 0, 8), (2, 0, 3, 8)], ids=str)
@pytest.mark.parametrize("seqlen_k", [0, 4])
def test_division_by_an_empty_dimension(device: str, shape_q: tuple[int, ...], seqlen_k: int) -> None:
    """FA PR#2470, FA#1159, PT#141219: no keys, no batch or no heads crashed or were rejected."""
    batch, _, heads, head_dim = shape_q
    q = torch.randn(shape_q, device=device, requires_grad=True)
    k, v = (torch.randn(batch, seqlen_k, heads, head_dim, device=device, requires_grad=True) for _ in range(2))
    out, lse = flash_attn_ext.attention(q, k, v, return_lse=True)
    assert out.shape == q.shape
    assert [g.shape for g in gradients(out, q, k, v)] == [q.shape, k.shape, v.shape]
    if seqlen_k == 0:
        assert not out.any()
        assert (lse == -math.inf).all()


def test_nan_gradients_in_padding_rows(device: str, dtype: torch.dtype) -> None:
    """PT PR#188933: cu_seqlens = [0, 144, 432, 944] with 946 rows left NaN in the gradients of the last two."""
    case = Case(lengths_q=(144, 288, 512), lengths_k=(144, 288, 512), tail=2, heads=1, heads_kv=1, head_dim=16)
    check(case.but(dtype=dtype, window_right=0), device)


def test_masked_row_with_a_sink(device: str, dtype: torch.dtype) -> None:
    """FA PR#2706: a row that sees only its sink must have out 0 and lse = sink."""
    case = Case(seqlen_q=20, seqlen_k=8, window_right=0, sinks=True, dtype=dtype)
    inputs = case.make(device)
    result = case.run_ours(inputs)
    assert not result["out"][:, :12].any()
    assert torch.equal(result["lse"][..., :12], inputs["sinks"][:, None].expand(2, -1, 12))
    check(case, device)


def test_strides_of_dout_ignored(device: str, dtype: torch.dtype) -> None:
    """FA#355, PT#138529: a transposed dout, and the stride-0 one of out.sum().backward(), gave wrong gradients."""
    q, k, v = (torch.randn(2, 40, 3, 16, dtype=dtype, device=device).requires_grad_() for _ in range(3))
    dout = torch.randn(2, 3, 16, 40, dtype=dtype, device=device).permute(0, 3, 1, 2)
    out = flash_attn_ext.attention(q, k, v)
    expected = torch.autograd.grad(out, (q, k, v), dout.contiguous(), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), expected))
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    out.sum().backward()
    assert all(map(torch.equal, (q.grad, k.grad, v.grad), expected))


def test_crash_on_expanded_keys_with_a_mask(device: str, dtype: torch.dtype) -> None:
    """PT#191937: stride-0 keys and values, 33 of them, a bool mask and head_dim 512 crashed."""
    q = torch.randn(1, 4, 2, 512, dtype=dtype, device=device)
    k, v = (torch.randn(1, 1, 2, 512, dtype=dtype, device=device).expand(1, 33, 2, 512) for _ in range(2))
    mask = torch.rand(1, 1, 4, 33, device=device) < 0.5
    mask[..., 0] = True
    out = flash_attn_ext.attention(q, k, v, mask=mask)
    # A mean of equal rows is that row, up to the rounding of weights that sum to 1.
    assert (out - v[:, :1]).abs().max() <= 4 * torch.finfo(dtype).eps * v.abs().max()


def test_illegal_access_where_only_the_bias_wants_a_gradient(device: str, dtype: torch.dtype) -> None:
    """PT#148476: (1, 1, 64, 16), requires_grad on the bias alone."""
    q, k, v = (torch.randn(1, 64, 1, 16, dtype=dtype, device=device) for _ in range(3))
    bias = torch.randn(1, 1, 64, 64, dtype=dtype, device=device, requires_grad=True)
    (alone,) = gradients(flash_attn_ext.attention(q, k, v, bias=bias), bias)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    assert torch.equal(gradients(flash_attn_ext.attention(q, k, v, bias=bias), bias, q, k, v)[0], alone)


def far_apart(path: Path, shape: tuple[int, ...], stride: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose dimension `dim` has a huge stride, in a sparse file, so that the gaps take no memory."""
    strides = list(torch.empty(shape, device="meta").stride())
    strides[dim] = stride
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).as_strided(shape, strides)


def test_overflow_of_mask_offsets(device: str, tmp_path: Path) -> None:
    """PT#150054: a bool mask with more than 2^31 elements (length 49999) was read at overflowed offsets."""
    if device == "cuda":
        pytest.skip("a sparse file does not lie in GPU memory; the full-size mask belongs to a GPU with room for it")
    mask = far_apart(tmp_path / "mask", (1, 1, 35, 35), 2**27 + 3, 2, torch.bool)  # row 34 starts beyond 2^32
    pattern = torch.rand(1, 1, 35, 35) < 0.5
    mask.copy_(pattern)
    q, k, v = (torch.randn(1, 35, 2, 16).requires_grad_() for _ in range(3))
    out, expected = (flash_attn_ext.attention(q, k, v, mask=m) for m in (mask, pattern))
    assert torch.equal(out, expected)
    assert all(map(torch.equal, gradients(out, q, k, v), gradients(expected, q, k, v)))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "head"])
def test_overflow_of_strides(device: str, dim: int, tmp_path: Path) -> None:
    """FA#772: a KV cache with a batch stride of 2^30 elements overflowed 32-bit offsets."""
    if device == "cuda":
        pytest.skip("a sparse file does not lie in GPU memory; the full-size cache belongs to a GPU with room for it")
    shape = (5, 5, 5, 16)
    near = [torch.randn(shape).bfloat16() for _ in range(3)]
    far = [far_apart(tmp_path / str(i), shape, 2**30, dim, torch.bfloat16).copy_(t) for i, t in enumerate(near)]
    assert torch.equal(flash_attn_ext.attention(*far), flash_attn_ext.attention(*near))


@pytest.mark.large
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(33728, 3), (3, 33728)])
def test_lengths_cast_to_16_bits(device: str, seqlen_q: int, seqlen_k: int) -> None:
    """XF#719: length 33728 with head_dim 512 passed through an int16 and gave NaN."""
    case = Case(batch=1, heads=1, heads_kv=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=512, head_dim_v=8)
    check(case, device)


@pytest.mark.large
def test_grid_limit_of_the_batch(device: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """PT#146704, PT#142228, XF#845: from batch 65536 on the kernel was not launched, and nobody said so."""
    q, k, v = (torch.randn(65537, 1, 1, 4, dtype=dtype, device=device).requires_grad_() for _ in range(3))
    out = flash_attn_ext.attention(q, k, v)
    dout = torch.randn_like(out)
    # One key: all of its value, up to what a tensor core keeps of a float32 as two tf32 numbers.
    rtol = 0 if dtype != torch.float32 or request.node.callspec.id.startswith("cpu") else 2**-22
    torch.testing.assert_close(out, v, rtol=rtol, atol=0)
    # P is exp(score - lse), where the lse is rounded: a few eps.
    assert torch.allclose(gradients(out, v, dout=dout)[0], dout, rtol=16 * torch.finfo(dtype).eps, atol=0)


def test_garbage_from_one_row_with_grouped_heads(device: str, dtype: torch.dtype) -> None:
    """PT PR#186434: Sq = 1, 8 query heads on 2 key heads, head_dim 128."""
    check(Case(batch=2, seqlen_q=1, seqlen_k=77, heads=8, heads_kv=2, head_dim=128, dtype=dtype), device)


def test_dq_differs_between_runs(device: str, dtype: torch.dtype) -> None:
    """FA#2244: deterministic=True, and dq differed between 30 runs."""
    q, k, v = (torch.randn(1, 300, 2, 64, dtype=dtype, device=device).requires_grad_() for _ in range(3))
    runs = [gradients(flash_attn_ext.attention(q, k, v, causal=True, deterministic=True), q)[0] for _ in range(30)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_dout_read_before_it_was_written(device: str) -> None:
    """FA PR#2481: a backward that starts while dout is still being computed read what was there before."""
    on_cuda_only(device, "needs a GPU: on the CPU dout is complete when the backward starts")
    q, k, v = (torch.randn(2, 1024, 8, 64, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(3))
    out = flash_attn_ext.attention(q, k, v)
    expected = gradients(out, q, k, v, dout=out.detach() * 2)
    out = flash_attn_ext.attention(q, k, v)
    dout = torch.full_like(out, math.nan)
    torch.cuda._sleep(50_000_000)
    torch.mul(out.detach(), 2, out=dout)
    assert all(map(torch.equal, gradients(out, q, k, v, dout=dout), expected))


def test_kernel_on_the_wrong_gpu(device: str) -> None:
    """FA PR#1793: tensors on a GPU that is not the current one gave a wrong result."""
    on_cuda_only(device, "needs two GPUs")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = (torch.randn(1, 100, 2, 64, dtype=torch.bfloat16, device="cuda:0") for _ in range(3))
    there = flash_attn_ext.attention(q.to("cuda:1"), k.to("cuda:1"), v.to("cuda:1"))
    assert torch.equal(there.to("cuda:0"), flash_attn_ext.attention(q, k, v))


@pytest.mark.parametrize("width", [1, 2, 16, 17, 64])
def test_sliding_window_off_by_one(device: str, dtype: torch.dtype, width: int) -> None:
    """HF#39408: window_size = (W - 1, 0) is W keys, the row's own included, neither one more nor one less."""
    q = torch.zeros(1, 90, 1, 8, dtype=dtype, device=device)
    v = torch.eye(90, dtype=dtype, device=device)[None, :, None]
    seen = flash_attn_ext.attention(q, q, v, window_size=(width - 1, 0))[0, :, 0] > 0
    row, col = torch.arange(90, device=device)[:, None], torch.arange(90, device=device)
    assert torch.equal(seen, (col <= row) & (col > row - width))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(20, 70), (70, 20)])
def test_causal_diagonal_in_the_wrong_corner(device: str, dtype: torch.dtype, seqlen_q: int, seqlen_k: int) -> None:
    """PT#108108, FA#1778: with Sq != Sk ours ends in the bottom right corner, torch's SDPA begins in the top left."""
    q = torch.zeros(1, seqlen_q, 1, 8, dtype=dtype, device=device)
    k = torch.zeros(1, seqlen_k, 1, 8, dtype=dtype, device=device)
    v = torch.eye(seqlen_k, dtype=dtype, device=device)[None, :, None]
    row, col = torch.arange(seqlen_q, device=device)[:, None], torch.arange(seqlen_k, device=device)
    seen = flash_attn_ext.attention(q, k, v, causal=True)[0, :, 0] > 0
    assert torch.equal(seen, col <= row + seqlen_k - seqlen_q)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    seen = flash_attn_ext.scaled_dot_product_attention(*heads_first, is_causal=True)[0, 0] > 0
    assert torch.equal(seen, col <= row)


def test_cu_seqlens_beyond_the_tensor(device: str) -> None:
    """HF#44643, FA#2381: cu_seqlens that claim 768 tokens of 256 rows read foreign memory instead of raising."""
    q, k, v = (torch.randn(256, 2, 16, device=device) for _ in range(3))
    starts = torch.tensor([0, 256, 768], dtype=torch.int32, device=device)
    if device == "cuda":  # contents are not read on the host: the kernels clamp them
        assert flash_attn_ext.attention_varlen(q, k, v, starts).isfinite().all()
        return
    with pytest.raises(ValueError, match="768") as caught:
        flash_attn_ext.attention_varlen(q, k, v, starts)
    assert "256" in str(caught.value)


def test_mask_silently_ignored(device: str, dtype: torch.dtype) -> None:
    """diffusers#12605: a mask that was passed had no effect."""
    q, k, v = (torch.randn(1, 30, 2, 16, dtype=dtype, device=device) for _ in range(3))
    mask = torch.ones(30, 30, dtype=torch.bool, device=device)
    mask[:, 11] = False
    bias = torch.zeros(30, 30, dtype=dtype, device=device).masked_fill(~mask, -math.inf)
    expected = flash_attn_ext.attention(q, *(torch.cat((t[:, :11], t[:, 12:]), 1) for t in (k, v)))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    for out in (
        flash_attn_ext.attention(q, k, v, mask=mask),
        flash_attn_ext.attention(q, k, v, bias=bias),
        flash_attn_ext.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2),
        flash_attn_ext.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2),
    ):
        # The same keys in other columns: the order of the sums is another one.
        assert (out - expected).abs().max() <= 4 * torch.finfo(dtype).eps * v.abs().max()
        assert not torch.equal(out, flash_attn_ext.attention(q, k, v))
