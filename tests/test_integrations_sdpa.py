"""integrations.sdpa: torch's scaled_dot_product_attention runs here, by name and as torch's kernels, and back again."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, bias, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

import flash_attn_ext
from flash_attn_ext import reference
from flash_attn_ext.integrations import flash_kernels, sdpa

TORCHS = F.scaled_dot_product_attention


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(dtype: torch.dtype = torch.float64, seqlen_k: int = 7) -> list[Tensor]:
    sizes = ((2, 4, 7, 16), (2, 4, seqlen_k, 16), (2, 4, seqlen_k, 16))
    return [normal(*size, seed=seed, dtype=dtype).requires_grad_() for seed, size in enumerate(sizes)]


@pytest.fixture(autouse=True)
def switched_off_after() -> Iterator[None]:
    yield
    sdpa.disable()
    torch._dynamo.reset()


def same(ours: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Result and gradients of a call while enabled are those of the same call while disabled."""
    sdpa.disable()
    expected = ours()
    dout = normal(*expected.shape, seed=9, dtype=expected.dtype)
    gradients = torch.autograd.grad(expected, inputs, dout)
    with sdpa.enable():
        out = ours()
        own = torch.autograd.grad(out, inputs, dout)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own, gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -0.3}, {"attn_mask": "bool"}])
def test_calls_by_name_run_here(options: dict[str, object]) -> None:
    inputs = qkv(seqlen_k=9)
    if options.get("attn_mask"):
        options = {"attn_mask": (normal(7, 9, seed=5) > -0.5).index_fill(1, torch.tensor([0]), True)}
    same(lambda: F.scaled_dot_product_attention(*inputs, **options), inputs)
    assert sdpa.stats() == sdpa.Stats(attended=1, returned={}, kernels=0, traced=0)


def test_masks_with_gradients_and_grouped_heads_run_here() -> None:
    q, k, v = qkv()
    mask = normal(4, 1, 7, seed=7).requires_grad_()
    same(lambda: F.scaled_dot_product_attention(q, k, v, mask), [q, k, v, mask])
    assert sdpa.stats().attended == 1
    q, k, v = q, *(x[:, :2].detach().requires_grad_() for x in (k, v))
    same(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), [q, k, v])
    assert sdpa.stats().attended == 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_function_imported_before_runs_our_kernels(is_causal: bool) -> None:
    inputs = qkv(seqlen_k=9)
    same(lambda: imported_by_name(*inputs, is_causal=is_causal), inputs)
    assert sdpa.stats() == sdpa.Stats(attended=0, returned={}, kernels=2, traced=0)
    assert F.scaled_dot_product_attention is TORCHS


@pytest.mark.parametrize("mask_shape", [(7, 9), (2, 1, 1, 9), (2, 4, 7, 9)])
def test_function_imported_before_with_mask(mask_shape: tuple[int, ...]) -> None:
    inputs, mask = qkv(seqlen_k=9), normal(*mask_shape, seed=5)
    same(lambda: imported_by_name(*inputs, mask), inputs)
    assert sdpa.stats().kernels == 2
    same(lambda: imported_by_name(*inputs, mask.index_fill(-1, torch.tensor([0]), 1.0) > 0), inputs)
    assert sdpa.stats().kernels == 2


def test_kernels_are_torchs_again() -> None:
    q = normal(1, 2, 40, 16, dtype=torch.float32)
    expected = imported_by_name(q, q, q)
    with sdpa.enable():
        assert not torch.equal(imported_by_name(q, q, q), expected)
    assert torch.equal(imported_by_name(q, q, q), expected)


def test_what_cannot_be_taken_goes_back_and_is_counted() -> None:
    long = normal(1, 1, 3, 600)
    q, k, v = (x.detach() for x in qkv())
    nested = torch.nested.nested_tensor([q[0].transpose(0, 1), k[0].transpose(0, 1)[:3]], layout=torch.jagged)
    nested = nested.transpose(1, 2)
    expected = F.scaled_dot_product_attention(nested, nested, nested).values()
    with sdpa.enable():
        torch.testing.assert_close(F.scaled_dot_product_attention(long, long, long), TORCHS(long, long, long))
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(q, k, v)
        with pytest.raises(RuntimeError) as torchs_error:
            F.scaled_dot_product_attention(q, k[..., :5], v)
        assert "flash_attn_ext" not in str(torchs_error.value)
        torch.testing.assert_close(F.scaled_dot_product_attention(nested, nested, nested).values(), expected)
    stats = sdpa.stats()
    assert stats.attended == 0
    for reason in (
        "a head dimension above 512",
        "switched off",
        "key must have query's batch and head_dim",
        "tensor subclass",
        "_for_cpu: head_dim",
    ):
        assert sum(reason in text for text in stats.returned) == 1, reason
    assert "1 went back to torch" in str(stats), stats


def test_kernel_that_declines_runs_torchs() -> None:
    q = normal(1, 2, 5, 16)
    with sdpa.enable():
        with pytest.raises(RuntimeError, match="dropout"):  # which takes no dropout either
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.5)
        assert list(sdpa.stats().returned) == ["_scaled_dot_product_flash_attention_for_cpu: dropout_p != 0"]
        wide = normal(1, 2, 5, 600)
        expected = torch.softmax(0.1 * wide @ wide.transpose(-1, -2), -1) @ wide
        torch.testing.assert_close(imported_by_name(wide, wide, wide, scale=0.1), expected)
        assert sdpa.stats().kernels == 0


def test_dropout_is_drawn_from_torchs_generator() -> None:
    q, k, v = qkv()
    with sdpa.enable():
        torch.manual_seed(0)
        first = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
        assert not torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)


def test_autocast() -> None:
    q, k, v = qkv(torch.float32)
    with sdpa.enable(), torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v)
        through_kernel = imported_by_name(q, k, v)
    assert out.dtype == through_kernel.dtype == torch.bfloat16
    exact = reference.attention(*(x.detach().bfloat16().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert (out - exact).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert sdpa.stats() == sdpa.Stats(attended=1, returned={}, kernels=1, traced=0)


def test_transformer_encoder_in_training_and_inference() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    x, padding = normal(3, 7, 16), torch.arange(7) >= torch.tensor([[7], [5], [3]])
    same(lambda: model(x, src_key_padding_mask=padding)[~padding], list(model.parameters()))
    assert sdpa.stats().attended == 2
    model.eval()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)[~padding]
        with sdpa.enable():
            torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], expected)
            assert sdpa.stats().attended == 2  # which torch's fast path would have bypassed
    assert torch.backends.mha.get_fastpath_enabled()


def test_compiled_code_follows() -> None:
    """Code compiled before is compiled anew; sizes are dynamic; counting causes no recompiles."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    inputs = qkv(seqlen_k=9)
    compiled(*inputs)
    graphs = []
    with sdpa.enable():
        for batch, rows, keys in ((3, 7, 9), (5, 10, 12), (6, 8, 31)):
            part = [normal(batch, 4, n, 16, seed=n) for n in (rows, keys, keys)]
            torch.testing.assert_close(compiled(*part), TORCHS(*part, is_causal=True))
            graphs.append(counter.frame_count)
        assert graphs == graphs[:1] * 3
        assert sdpa.stats().traced == graphs[0] - 1
        assert "flash_attn_ext.forward" in counter.graphs[-1].code
    torch._dynamo.reset()
    compiled(*inputs)
    assert "flash_attn_ext" not in counter.graphs[-1].code


def test_compiled_calls_go_back_too() -> None:
    long = normal(1, 1, 3, 600)
    with sdpa.enable():
        compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(long), TORCHS(long, long, long))
        assert [n for why, n in sdpa.stats().returned.items() if "in a compiled graph" in why] == [1]


CAUSAL_BIASES = pytest.mark.parametrize("make_bias", [bias.causal_upper_left, bias.causal_lower_right])


@CAUSAL_BIASES
@pytest.mark.parametrize("sizes", [(7, 7), (7, 9), (9, 7), (1, 7)])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_causal_biases_of_torch(make_bias: Callable[..., Tensor], sizes: tuple[int, int]) -> None:
    q, k, v = (normal(2, 4, n, 16, seed=i).requires_grad_() for i, n in enumerate((*sizes, sizes[1])))
    mask = make_bias(*sizes)
    same(lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), [q, k, v])
    assert sdpa.stats() == sdpa.Stats(attended=1, returned={}, kernels=0, traced=0)
    expected = TORCHS(q, k, v, mask)
    torch.testing.assert_close(flash_attn_ext.scaled_dot_product_attention(q, k, v, mask), expected)
    with sdpa.enable(), sdpa_kernel(SDPBackend.MATH):  # which torch has to do
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), expected)
        assert sdpa.stats().attended == 0
        assert list(sdpa.stats().returned.values()) == [1]


@CAUSAL_BIASES
def test_compiled_causal_biases_of_torch(make_bias: Callable[..., Tensor]) -> None:
    q, k, v = (x.detach() for x in qkv(seqlen_k=9))
    mask = make_bias(7, 9)
    expected = TORCHS(q, k, v, mask)
    with sdpa.enable():
        compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v, mask), expected)
        assert (sdpa.stats().traced, sdpa.stats().returned) == (1, {})


def test_causal_biases_that_do_not_fit() -> None:
    q, k, v = (x.detach() for x in qkv(seqlen_k=9))
    with sdpa.enable():
        with pytest.raises(ValueError, match="got both"):  # torch's error has the same class
            F.scaled_dot_product_attention(q, k, v, bias.causal_upper_left(7, 9), is_causal=True)
        with pytest.raises(RuntimeError, match="must match"):
            F.scaled_dot_product_attention(q, k, v, bias.causal_lower_right(7, 8))
        # Torch reads no sizes from this one.
        out = F.scaled_dot_product_attention(q, k, v, bias.causal_upper_left(3, 4))
        torch.testing.assert_close(out, TORCHS(q, k, v, is_causal=True))
    assert sdpa.stats().attended == 1


class WithoutFunctions(Tensor):
    """A subclass that has torch's own functions."""


class WithFunctions(Tensor):
    """A subclass that answers for itself."""

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        if func is TORCHS:
            return "mine"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses() -> None:
    q = normal(1, 2, 5, 16)
    with sdpa.enable():
        out = F.scaled_dot_product_attention(*[q.as_subclass(WithoutFunctions)] * 3)
        assert type(out) is WithoutFunctions
        assert sdpa.stats().attended == 1
        assert F.scaled_dot_product_attention(q, q, q.as_subclass(WithFunctions)) == "mine"
        assert list(sdpa.stats().returned) == ["a tensor subclass with an attention of its own"]


def test_modes_do_not_switch_it_off() -> None:
    q = normal(1, 2, 5, 16)
    with sdpa.enable():
        with torch.device("cpu"):
            F.scaled_dot_product_attention(q, q, q)
        torch.set_default_device("cpu")
        try:
            F.scaled_dot_product_attention(q, q, q)
        finally:
            torch.set_default_device(None)
        assert sdpa.stats() == sdpa.Stats(attended=2, returned={}, kernels=0, traced=0)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = normal(1, 2, 5, 16)
    with sdpa.enable():
        program = torch.export.export(Model(), (q,), strict=strict)
    assert "flash_attn_ext.forward" in str(program.graph)
    torch.testing.assert_close(program.module()(q), TORCHS(q, q, q, is_causal=True))


@pytest.mark.parametrize("dropout_p", [-0.5, 1.5])
@pytest.mark.parametrize("function", ["by name", "held"])
def test_impossible_dropout(dropout_p: float, function: str) -> None:
    q = normal(1, 2, 5, 16)
    with pytest.raises(RuntimeError) as torchs:
        TORCHS(q, q, q, dropout_p=dropout_p)
    with sdpa.enable():
        called = F.scaled_dot_product_attention if function == "by name" else imported_by_name
        with pytest.raises(RuntimeError) as ours:
            called(q, q, q, dropout_p=dropout_p)
    assert str(ours.value) == str(torchs.value)


DTENSORS = """
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from flash_attn_ext.integrations import dtensor, sdpa

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
local = torch.randn(2, 4, 7, 16, dtype=torch.float64)
q = distribute_tensor(local, mesh, [Shard(0)])
expected = F.scaled_dot_product_attention(local, local, local)
with sdpa.enable():
    with sdpa_kernel(SDPBackend.MATH):  # torch's only attention of DTensors on the CPU
        out = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out.full_tensor(), expected)
    print(sdpa.stats().attended, sdpa.stats().returned)
    dtensor.register()
    out = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out.full_tensor(), expected)
    with sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    print(sdpa.stats().attended, sdpa.stats().returned["DTensors with dropout"])
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_dtensors_run_here_once_they_are_registered(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys\n" + DTENSORS, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0 {'DTensors, without integrations.dtensor.register()': 1}", "1 1"]


def test_nesting_and_order() -> None:
    sdpa.disable()
    with sdpa.enable():
        with sdpa.enable():
            pass
        assert F.scaled_dot_product_attention is not TORCHS
        held = F.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is TORCHS
    q, k, v = qkv()
    assert torch.equal(held(q, k, v), TORCHS(q, k, v))
    sdpa.enable()
    F.scaled_dot_product_attention = TORCHS
    with pytest.raises(RuntimeError, match="expected to be that of flash_attn_ext"):
        sdpa.disable()
    F.scaled_dot_product_attention = held


def test_what_somebody_else_put_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Tensor, **options: object) -> Tensor:
        return TORCHS(*args, **options) * 2

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    long = normal(1, 1, 3, 600)
    with sdpa.enable():
        assert torch.equal(F.scaled_dot_product_attention(long, long, long), theirs(long, long, long))
    assert F.scaled_dot_product_attention is theirs


def test_failure_to_enable_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_kernels, "cuda_library_status", "loaded")
    monkeypatch.setattr(flash_kernels, "CUDA_KERNELS", {"_flash_attention_forward": None})
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", None)
    with pytest.raises(TypeError):
        sdpa.enable()
    assert F.scaled_dot_product_attention is TORCHS
    assert torch.backends.mha.get_fastpath_enabled()
    q = normal(1, 2, 5, 16)
    imported_by_name(q, q, q)
    assert sdpa.stats().kernels == 0


def test_counts_from_many_threads() -> None:
    q = normal(1, 1, 3, 8)
    with sdpa.enable():
        many = [lambda: [F.scaled_dot_product_attention(q, q, q) for _ in range(50)]] * 2
        threads = [threading.Thread(target=calls) for calls in many]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sdpa.stats().attended == 100


# What torch's registry gets for CUDA, on CPU tensors: the same functions, whose ops choose by device.


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_cuda_kernels_of_dense_attention(dropout_p: float) -> None:
    kernels = flash_kernels.CUDA_KERNELS
    q, k, v = qkv()
    torch.manual_seed(3)
    out, lse, _, _, max_q, max_k, rng_state, unused, _ = kernels["_scaled_dot_product_flash_attention"](
        *(x.detach() for x in (q, k, v)), dropout_p, True, False, scale=0.2
    )
    layout = [x.transpose(1, 2) for x in (q, k, v)]
    options = {"causal": True, "softmax_scale": 0.2, "dropout_p": dropout_p, "rng_state": rng_state.view(torch.int64)}
    expected, expected_lse = reference.attention(*layout, **options, return_lse=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    torch.testing.assert_close(lse, expected_lse)
    assert out.stride() == torch.empty_like(q).stride()
    dout = normal(*out.shape, seed=8)
    gradients = kernels["_scaled_dot_product_flash_attention_backward"](
        *(dout, q.detach(), k.detach(), v.detach(), out, lse, None, None, max_q, max_k, dropout_p, True),
        *(rng_state, unused),
        scale=0.2,
    )
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.transpose(1, 2), (q, k, v), dout))


def test_cuda_kernels_of_packed_attention() -> None:
    kernels = flash_kernels.CUDA_KERNELS
    q, k, v = (normal(12, heads, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    window = {"window_size_left": 3, "window_size_right": -1, "scale": None}
    given = tuple(x.detach() for x in (q, k, v))
    out, lse, rng_state, unused, _ = kernels["_flash_attention_forward"](
        *given, lengths, lengths, 7, 7, 0.0, True, False, **window
    )
    expected, expected_lse = reference.attention_varlen(
        q, k, v, lengths, causal=True, window_size=(3, -1), return_lse=True
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    dout = normal(*out.shape, seed=8)
    gradients = kernels["_flash_attention_backward"](
        dout, *given, out, lse, lengths, lengths, 7, 7, 0.0, True, rng_state, unused, **window
    )
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k, v), dout))
    into = torch.empty_like(out)
    kernels["_flash_attention_forward_no_dropout_inplace"](
        into, *given, lengths, lengths, 7, 7, 0.0, True, False, **window
    )
    assert torch.equal(into, out)


def test_registry_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CUDA library loaded, torch's registry names ours while enabled, and its dispatcher has our kernels."""
    monkeypatch.setattr(flash_kernels, "cuda_library_status", "loaded")
    op = "aten::_scaled_dot_product_flash_attention"
    before = torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    with sdpa.enable():
        assert torch.nn.attention.current_flash_attention_impl() == flash_kernels.IMPLEMENTATION
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA") == before
