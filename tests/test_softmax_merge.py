"""softmax and merge, forward and backward, on every CPU level and on CUDA.

The rule for errors is that of flash_attn_ext.reference: twice torch's own in the same precision, plus the rounding of
the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import CPU_LEVELS, MATRIX_LEVELS
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import _C, reference

ops = torch.ops.flash_attn_ext
INF = float("inf")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLACES = [f"cpu-{level}" for level in CPU_LEVELS if level not in MATRIX_LEVELS] + [
    pytest.param("cuda", marks=pytest.mark.gpu)
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test. New memory holds NaN, so that whatever a kernel leaves unwritten shows."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    device, _, level = request.param.partition("-")
    torch.use_deterministic_algorithms(True, warn_only=True)
    _C.set_cpu_level(level)
    torch.manual_seed(0)
    yield device
    _C.set_cpu_level("")
    torch.use_deterministic_algorithms(False)


def check(ours: Tensor, exact: Tensor, torchs: Tensor) -> None:
    """ours and torchs: results in the same dtype; exact: the same from float64."""
    assert ours.shape == exact.shape
    assert ours.dtype == torchs.dtype
    special = ~exact.isfinite()
    torch.testing.assert_close(ours.double()[special], exact[special], rtol=0, atol=0, equal_nan=True)
    if torchs.dtype == torch.float64:  # the "exact" result is no more exact than torch's, and its error adds to ours
        bound = reference.error_bound(exact, torchs.float(), torch.float64, factor=3.0)
    else:
        bound = reference.error_bound(exact, torchs, torchs.dtype)
    if not special.all():
        assert (ours.double() - exact)[~special].abs().max().item() <= bound


def softmax_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).softmax(-1)


def softmax_beyond_float64(x: Tensor) -> Tensor:
    """Rounded once, from long double: torch's float64 result has errors of its own, which are no smaller than ours."""
    wide = x.cpu().numpy().astype(np.longdouble)
    exponentials = np.exp(wide - wide.max(-1, keepdims=True))
    return torch.from_numpy((exponentials / exponentials.sum(-1, keepdims=True)).astype(np.float64))


# ---- softmax --------------------------------------------------------------------------------------------------------

# Around the widths of vectors and packs, the change from a warp to a block per row (1024), and beyond one block.
LENGTHS = (1, 2, 3, 7, 8, 16, 31, 33, 64, 100, 127, 128, 1000, 1024, 1025, 1032, 4096, 5001, 70000)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(place: str, dtype: torch.dtype, length: int) -> None:
    rows = 100 if length < 10000 else 10  # enough that the largest of their errors is not a matter of luck
    x = (5 * torch.randn(rows, length, device=place)).to(dtype)
    if dtype == torch.float64:
        ours, torchs, exact = ops.softmax(x).cpu(), x.softmax(-1).cpu(), softmax_beyond_float64(x)
        # The rule: twice torch's own error, and the rounding of results of up to 1.
        assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + torch.finfo(dtype).eps
    else:
        check(ops.softmax(x), softmax_of(x, torch.float64), softmax_of(x, dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_backward(place: str, dtype: torch.dtype, length: int) -> None:
    y, dy = softmax_of(torch.randn(5, length, device=place), dtype), torch.randn(5, length, device=place).to(dtype)
    low = torch.float32 if dtype == torch.float64 else dtype

    def by_torch(dtype: torch.dtype) -> Tensor:
        return torch.ops.aten._softmax_backward_data(dy.to(dtype), y.to(dtype), -1, dtype)

    check(ops.softmax_backward(dy, y), by_torch(torch.float64), by_torch(low).to(dtype))


@pytest.mark.parametrize("length", [5, 64, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_of_infinities_and_nan_is_torchs(place: str, dtype: torch.dtype, length: int) -> None:
    x = torch.randn(6, length, device=place).to(dtype)
    x[0] = -INF
    x[1, length // 2] = INF
    x[2, length // 2] = torch.nan
    x[3, : length - 1] = -INF
    x[4, length // 2 :] = -INF
    ours, exact = ops.softmax(x), softmax_of(x, torch.float64)
    assert torch.equal(ours.isnan(), exact.isnan())
    assert ours[3, -1] == 1
    assert (ours[4, length // 2 :] == 0).all()
    torch.testing.assert_close(ours[3:].double(), exact[3:], atol=torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_softmax_does_not_overflow(place: str, scale: float) -> None:
    x = scale * torch.randn(4, 300, device=place)
    torch.testing.assert_close(ops.softmax(x).double(), softmax_of(x, torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 5), (2, 0, 5), (2, 3, 4, 5)])
def test_softmax_of_every_rank_and_of_nothing(place: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=place)
    y = ops.softmax(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, x.softmax(-1))
    dy = torch.randn_like(x)
    torch.testing.assert_close(ops.softmax_backward(dy, y), torch.ops.aten._softmax_backward_data(dy, y, -1, x.dtype))


def test_softmax_takes_any_strides(place: str) -> None:
    x = torch.randn(6, 50, 9, device=place)
    for view in (x.mT, x[:, ::2], x[..., ::3], x[:, :1].expand(6, 7, 9), x[..., :1].expand(6, 50, 9), x[..., 1:]):
        torch.testing.assert_close(ops.softmax(view), view.softmax(-1))
        y, dy = view.softmax(-1).mT.contiguous().mT, torch.ones((), device=place).expand(view.shape)
        expected = torch.ops.aten._softmax_backward_data(dy, y, -1, x.dtype)
        torch.testing.assert_close(ops.softmax_backward(dy, y), expected)


def test_softmax_of_more_rows_than_a_grid_dimension_of_65535(place: str) -> None:
    x = torch.randn(70000, 6, device=place)
    torch.testing.assert_close(ops.softmax(x), x.softmax(-1))


# ---- merge ----------------------------------------------------------------------------------------------------------

# Enough rows each that the largest of their errors is not a matter of luck.
SHAPES = [
    (2, 200, 3, 64),
    (90, 5, 1, 1),
    (2, 90, 4, 7),
    (3, 300, 2, 128),
    (2, 200, 2, 512),
    (1000, 2, 64),
    (400, 3, 80),
]


def sides(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """out_a, lse_a, out_b, lse_b; some rows have seen nothing on one side, the first of each head on both."""
    *batch, rows, heads, _ = shape
    result = []
    for _ in "ab":
        out = torch.randn(shape, device=device).to(dtype)
        lse = 3 * torch.randn(*batch, heads, rows, device=device, dtype=reference_dtype(dtype))
        unseen = torch.rand(lse.shape, device=device) < 0.2
        unseen[..., 0] = True
        lse[unseen] = -INF
        out[unseen.mT] = 0
        result += [out, lse]
    return result


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def column(stats: Tensor) -> Tensor:
    """(batch, heads, rows) or (heads, rows) beside (batch, rows, heads, columns) or (rows, heads, columns)"""
    return stats.mT.unsqueeze(-1)


def weight(lse_side: Tensor, lse: Tensor) -> Tensor:
    return (lse_side - lse.masked_fill(lse == -INF, 0)).exp()


def merge_by_torch(args: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The formula with torch's operators: the outs in dtype, the statistics in float32 (float64)."""
    out_a, out_b = (x.to(dtype) for x in args[::2])
    lse_a, lse_b = (x.to(reference_dtype(dtype)) for x in args[1::2])
    lse = torch.logaddexp(lse_a, lse_b)
    weights = (column(weight(x, lse)).to(dtype) for x in (lse_a, lse_b))
    return sum(w * x for w, x in zip(weights, (out_a, out_b), strict=True)), lse


def merge_backward_by_torch(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """dout_side = w * dout and dlse_side = w * (dlse + dout . (out_side - out)), w = exp(lse_side - lse)."""
    stats = reference_dtype(dtype)
    dout, dlse, out_a, lse_a, out_b, lse_b, out, lse = (x.to(stats if i % 2 else dtype) for i, x in enumerate(tensors))
    grads = []
    for out_side, lse_side in ((out_a, lse_a), (out_b, lse_b)):
        w = weight(lse_side, lse)
        dot = (dout * (out_side - out)).sum(-1).mT
        grads += [column(w).to(dtype) * dout, w * (dlse + dot.to(stats))]
    return grads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(place: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = sides(shape, dtype, place)
    ours, exact = ops.merge(*args), merge_by_torch(args, torch.float64)
    low = torch.float32 if dtype == torch.float64 else dtype
    for x, r, t in zip(ours, exact, merge_by_torch(args, low), strict=True):
        check(x, r, t.to(x.dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_backward(place: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = sides(shape, dtype, place)
    out, lse = ops.merge(*args)
    grads = [torch.randn_like(out), torch.randn_like(lse)]
    tensors = [*grads, *args, out, lse]
    low = torch.float32 if dtype == torch.float64 else dtype
    exact, torchs = (merge_backward_by_torch(tensors, d) for d in (torch.float64, low))
    for x, r, t in zip(ops.merge_backward(*tensors), exact, torchs, strict=True):
        check(x, r, t.to(x.dtype))


def test_merge_joins_attention_over_two_sets_of_keys(place: str) -> None:
    q, k, v = (torch.randn(2, rows, 3, 16, device=place, dtype=torch.float64) for rows in (9, 20, 20))

    def attention(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention(q, k, v, return_lse=True)

    out, lse = ops.merge(*attention(k[:, :6], v[:, :6]), *attention(k[:, 6:], v[:, 6:]))
    expected_out, expected_lse = attention(k, v)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_merge_takes_any_strides(place: str) -> None:
    args = sides((2, 6, 4, 24), torch.float32, place)
    expected = ops.merge(*args)
    grads = [torch.randn_like(x) for x in expected]
    expected_grads = ops.merge_backward(*grads, *args, *expected)

    def restride(x: Tensor, order: tuple[int, ...], offset: int) -> Tensor:
        """The same values with dimensions in another order in memory, behind `offset` elements."""
        permuted = x.permute(order)
        memory = torch.zeros(permuted.numel() + offset, device=x.device, dtype=x.dtype)[offset:].view(permuted.shape)
        memory.copy_(permuted)
        return memory.permute([order.index(i) for i in range(x.dim())])

    for out_order, lse_order, offset in (
        ((0, 2, 1, 3), (0, 2, 1), 0),
        ((3, 0, 2, 1), (2, 1, 0), 0),
        ((0, 1, 2, 3), (0, 1, 2), 1),
    ):
        moved, moved_grads = (
            [restride(x, out_order if x.dim() == 4 else lse_order, offset) for x in group] for group in (args, grads)
        )
        for x, y in zip(ops.merge(*moved), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        for x, y in zip(ops.merge_backward(*moved_grads, *moved, *expected), expected_grads, strict=True):
            # The order of a sum over 24 columns depends on how many are read at once.
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    one = torch.ones((), device=place).expand(2, 6, 4, 24)
    for x, y in zip(
        ops.merge_backward(one, grads[1], *args, *expected),
        ops.merge_backward(one.contiguous(), grads[1], *args, *expected),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 3, 8), (2, 3, 0, 8), (0, 2, 8), (4, 0, 8)])
def test_merge_of_nothing(place: str, shape: tuple[int, ...]) -> None:
    args = [torch.empty_like(x) for x in sides_of_nothing(shape, place)]
    out, lse = ops.merge(*args)
    assert (out.shape, lse.shape) == (args[0].shape, args[1].shape)
    assert [x.shape for x in ops.merge_backward(out, lse, *args, out, lse)] == [x.shape for x in args]


def sides_of_nothing(shape: tuple[int, ...], device: str) -> list[Tensor]:
    *batch, rows, heads, _ = shape
    return [torch.empty(shape, device=device), torch.empty(*batch, heads, rows, device=device)] * 2


def test_merge_of_a_batch_beyond_65535(place: str) -> None:
    args = sides((66000, 1, 1, 8), torch.float32, place)
    out, lse = ops.merge(*args)
    expected_out, expected_lse = merge_by_torch(args, torch.float32)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


# ---- autograd, tracing, reproducibility -----------------------------------------------------------------------------


def double(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)


def test_gradcheck(place: str) -> None:
    assert torch.autograd.gradcheck(flash_attn_ext.softmax, [double(3, 17, device=place)])
    assert torch.autograd.gradgradcheck(flash_attn_ext.softmax, [double(3, 5, device=place)])
    inputs = [double(*shape, device=place) for shape in ((2, 3, 2, 5), (2, 2, 3)) * 2]
    assert torch.autograd.gradcheck(flash_attn_ext.merge, inputs)
    assert torch.autograd.gradcheck(ops.merge, inputs)


def test_opcheck(place: str) -> None:
    x = torch.randn(3, 17, device=place, requires_grad=True)
    torch.library.opcheck(ops.softmax.default, (x,))
    torch.library.opcheck(ops.softmax_backward.default, (x.detach(), x.detach()))
    args = [x.requires_grad_() for x in sides((2, 5, 3, 8), torch.float32, place)]
    args[1].data.nan_to_num_(neginf=0.0)  # opcheck compares gradients, and takes NaN of inf - inf for a difference
    args[3].data.nan_to_num_(neginf=0.0)
    torch.library.opcheck(ops.merge.default, tuple(args))
    out, lse = ops.merge(*args)
    detached = [x.detach() for x in (out, lse, *args, out, lse)]
    torch.library.opcheck(ops.merge_backward.default, tuple(detached))


def test_results_keep_their_bits(place: str) -> None:
    x = torch.randn(50, 3001, device=place)
    args = sides((2, 500, 4, 64), torch.float32, place)
    grads = [torch.randn_like(x) for x in args[:2]]

    def run() -> list[Tensor]:
        y, merged = ops.softmax(x), ops.merge(*args)
        return [y, ops.softmax_backward(x, y), *merged, *ops.merge_backward(*grads, *args, *merged)]

    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(run())
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- arguments that do not fit --------------------------------------------------------------------------------------


def test_errors_name_every_unmet_constraint(place: str) -> None:
    x = torch.zeros(2, 3, device=place)
    with pytest.raises(
        RuntimeError, match=r"^flash_attn_ext.softmax: 1 constraint is not met\n- x must be float64, .* got int32$"
    ):
        ops.softmax(x.int())
    with pytest.raises(RuntimeError, match=r"- dy must be float32 of shape \(2, 3\), got float64 of shape \(2, 4\)"):
        ops.softmax_backward(torch.zeros(2, 4, device=place, dtype=torch.float64), x)
    out, lse = torch.zeros(2, 5, 3, 8, device=place), torch.zeros(2, 3, 5, device=place)
    with pytest.raises(RuntimeError) as info:
        ops.merge(out, lse.mT, out[..., :4], lse.double())
    assert str(info.value).splitlines()[0] == "flash_attn_ext.merge: 3 constraints are not met"
    for line in (
        "- out_b must be float32 of shape (2, 5, 3, 8), got float32 of shape (2, 5, 3, 4)",
        "- lse_a must be float32 of shape (2, 3, 5), got float32 of shape (2, 5, 3)",
        "- lse_b must be float32 of shape (2, 3, 5), got float64 of shape (2, 3, 5)",
    ):
        assert line in str(info.value)
    with pytest.raises(RuntimeError, match=r"out_a must have 4 dimensions .* or 3 "):
        ops.merge(out[0, 0], lse, out, lse)
    with pytest.raises(RuntimeError, match="- dout must be float32 of shape"):
        ops.merge_backward(out[:1], lse, out, lse, out, lse, out, lse)
