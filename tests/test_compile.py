"""The ops and functions under torch's tracers: opcheck, torch.compile, torch.export, fake and meta tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flash_attn_ext
from flash_attn_ext import reference

OPS = torch.ops.flash_attn_ext


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Options of the ops forward and backward, in the order of their schema.
NO_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(
        ("bias", "mask", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    ),
    **dict.fromkeys(("rng_state", "max_seqlen_q", "max_seqlen_k", "window_left", "window_right")),
    "softmax_scale": 0.3,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "allow_tf32": False,
}
DENSE = (normal(2, 7, 4, 8, seed=1), normal(2, 9, 2, 8, seed=2), normal(2, 9, 2, 5, seed=3))
PACKED = (normal(12, 4, 8, seed=1), normal(15, 2, 8, seed=2), normal(15, 2, 5, seed=3))
CALLS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "causal": (DENSE, {"window_right": 0}),
    "window, softcap, used lengths": (
        DENSE,
        {"window_left": 3, "window_right": -1, "softcap": 2.0, "seqused_q": int32(5, 7), "seqused_k": int32(9, 4)},
    ),
    "everything added": (
        DENSE,
        {
            "bias": normal(1, 4, 1, 9),
            "mask": normal(2, 1, 7, 9) > 0,
            "alibi_slopes": normal(4).abs(),
            "sinks": normal(4),
        },
    ),
    "dropout": (DENSE, {"dropout_p": 0.3, "rng_state": torch.tensor([5, 7])}),
    "strided": (tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in DENSE), {}),
    "packed": (
        PACKED,
        {"cu_seqlens_q": int32(0, 5, 12), "cu_seqlens_k": int32(0, 9, 14), "max_seqlen_q": 7, "window_right": 0},
    ),
    "float64": (tuple(x.double() for x in DENSE), {"sinks": normal(4, dtype=torch.float64)}),
    "bfloat16": (tuple(x.bfloat16() for x in DENSE), {"bias": normal(2, 1, 7, 1)}),
    "nothing": ((normal(0, 7, 4, 8), normal(0, 9, 2, 8), normal(0, 9, 2, 5)), {}),
}


def leaves(tensors: Any) -> Any:
    return tuple(x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors)


@pytest.mark.parametrize("call", CALLS)
def test_opcheck_forward(call: str) -> None:
    tensors, options = CALLS[call]
    options = {n: x.clone().requires_grad_() if n in ("bias", "sinks") else x for n, x in options.items()}
    torch.library.opcheck(OPS.forward.default, (*leaves(tensors), *(NO_OPTIONS | options).values()))


@pytest.mark.parametrize("bias_requires_grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_backward(call: str, bias_requires_grad: bool) -> None:
    tensors, options = CALLS[call]
    values = (NO_OPTIONS | options).values()
    out, lse = OPS.forward(*tensors, *values)
    wanted = bias_requires_grad and "bias" in options
    for dlse in (None, normal(*lse.shape, dtype=lse.dtype)):
        args = (normal(*out.shape, dtype=out.dtype), dlse, *tensors, out, lse, *values, True, wanted)
        torch.library.opcheck(OPS.backward.default, args)


@pytest.mark.parametrize("shape", [(2, 7, 4, 8), (7, 4, 8), (0, 4, 8)])
def test_opcheck_merge(shape: tuple[int, ...]) -> None:
    stats = (*shape[:-3], shape[-2], shape[-3])
    tensors = (normal(*shape), normal(*stats, seed=1), normal(*shape, seed=2), normal(*stats, seed=3))
    torch.library.opcheck(OPS.merge.default, leaves(tensors))
    torch.library.opcheck(OPS.merge_backward.default, (*tensors[:2], *tensors, *OPS.merge(*tensors)))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 70), (9,), (0, 4), (4, 0)])
def test_opcheck_softmax(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(OPS.softmax.default, leaves([normal(*shape)]))
    torch.library.opcheck(OPS.softmax.default, leaves([normal(*shape[::-1]).T if len(shape) == 2 else normal(*shape)]))
    torch.library.opcheck(OPS.softmax_backward.default, leaves([normal(*shape), normal(*shape, seed=1)]))


# Functions of (q, k, v) with everything else fixed, for sizes that change from call to call.


def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One tensor in three places."""
    return flash_attn_ext.attention(q, q, q, causal=True)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = flash_attn_ext.attention(q, k, v, window_size=(4, 2), softcap=3.0, return_lse=True)
    return out + lse.transpose(1, 2)[..., None]


def with_bias_and_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = q.sum(-1).transpose(1, 2)[..., None]
    return flash_attn_ext.attention(q, k, v, bias=bias, mask=bias > -3, sinks=q[0, 0, :, 0])


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = [torch.arange(x.shape[0] + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    return flash_attn_ext.attention_varlen(*rows, *lengths, max_seqlen_q=q.shape[1], max_seqlen_k=k.shape[1])


def torchs_shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def torchs_shape_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k[:1, :, :1], v[:1, :, :1]))
    mask = (q[..., :1] > 0) & (k[..., 0] > -9)[..., None, :]
    return flash_attn_ext.scaled_dot_product_attention(q, k, v, mask)


def flash_attns_shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_ext.flash_attn_func(q, k, v, causal=True)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [flash_attn_ext.attention(q, k[:, i::2], v[:, i::2], return_lse=True) for i in range(2)]
    return flash_attn_ext.merge(*parts[0], *parts[1])[0]


def soft(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_ext.softmax(q)


FUNCTIONS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    self_attention,
    with_lse,
    with_bias_and_sinks,
    packed,
    torchs_shape,
    torchs_shape_broadcast,
    flash_attns_shape,
    merged,
    soft,
]


def results(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    inputs = leaves(tensors)
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, normal(*out.shape, seed=9, dtype=out.dtype), materialize_grads=True)
    return [out.detach(), *gradients]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_whole_and_dynamic(function: Callable[..., Tensor]) -> None:
    """One graph for all sizes, the results of eager calls bit for bit, gradients included."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    # Sizes that are equal in the first call would be taken to be equal in all.
    for batch, seqlen_q, seqlen_k in ((3, 7, 9), (5, 10, 12), (6, 7, 31)):
        tensors = normal(batch, seqlen_q, 4, 8), normal(batch, seqlen_k, 2, 8), normal(batch, seqlen_k, 2, 8, seed=1)
        torch.testing.assert_close(results(compiled, tensors), results(function, tensors), rtol=0, atol=0)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "dropout_p"])
def test_tensors_for_numbers_end_a_graph(name: str) -> None:
    """Graphs keep numbers: what a tensor holds is read between two of them, and one alone says why it cannot be."""

    def attend(q: Tensor, number: Tensor) -> Tensor:
        return flash_attn_ext.attention(q, q, q, **{name: number})

    def seeded(function: Callable[..., Tensor], number: float) -> Tensor:
        torch.manual_seed(0)
        return function(q, torch.tensor(number))

    q = normal(2, 9, 2, 8)
    compiled = torch.compile(attend, backend="aot_eager")
    for number in (0.25, 0.75):
        assert torch.equal(seeded(compiled, number), seeded(attend, number))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a tensor as softmax_scale, softcap or dropout_p; pass a number"):
        torch.compile(attend, backend="aot_eager", fullgraph=True)(q, torch.tensor(0.25))


def test_many_lengths_compile_twice_without_being_asked() -> None:
    """By default torch compiles for the first length, and at the second for all."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attn_ext.attention, fullgraph=True, backend=counter)
    graphs = []
    for seqlen in (5, 8, 9, 16, 33, 40):
        q, k = normal(2, seqlen, 4, 8), normal(2, seqlen, 2, 8)
        assert torch.equal(compiled(q, k, k, causal=True), flash_attn_ext.attention(q, k, k, causal=True))
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 2, 2]


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (with_bias_and_sinks(q, k, v) * 2).sin()

    tensors = tuple(x.double() for x in (normal(2, 7, 4, 8), normal(2, 9, 2, 8, seed=1), normal(2, 9, 2, 8, seed=2)))
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    # Inductor adds up sums in another order, and has a sine of its own.
    torch.testing.assert_close(results(compiled, tensors), results(block, tensors), rtol=1e-12, atol=1e-12)


def test_compiled_dropout_draws_anew() -> None:
    compiled = torch.compile(flash_attn_ext.attention, fullgraph=True, backend="aot_eager")
    q = normal(2, 7, 4, 8)
    torch.manual_seed(1)
    first = compiled(q, q, q, dropout_p=0.5)
    assert not torch.equal(compiled(q, q, q, dropout_p=0.5), first)
    torch.manual_seed(1)
    assert torch.equal(flash_attn_ext.attention(q, q, q, dropout_p=0.5), first)


def test_compiled_modules_train() -> None:
    module = flash_attn_ext.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    x = normal(2, 7, 16, dtype=torch.float64)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)

    def loss(m: torch.nn.Module) -> Tensor:
        return m(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0].square().sum()

    expected = torch.autograd.grad(loss(module), list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    own = torch.autograd.grad(loss(compiled), list(module.parameters()))
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_vmap_compiles() -> None:
    q, k = normal(3, 2, 7, 4, 8, dtype=torch.float64), normal(2, 9, 2, 8, dtype=torch.float64)

    def mapped(q: Tensor) -> Tensor:
        return torch.vmap(lambda q: flash_attn_ext.attention(q, k, k, causal=True))(q)

    torch.testing.assert_close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(q), mapped(q))


class Exported(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = flash_attn_ext.attention(q, k, v, causal=True, softcap=5.0)
        return attended + torchs_shape(q, k, v).transpose(1, 2)


def test_exports_with_dynamic_sizes() -> None:
    batch, seqlen = torch.export.Dim("batch"), torch.export.Dim("seqlen")
    sizes = {0: batch, 1: seqlen}
    example = normal(2, 7, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 8)
    program = torch.export.export(Exported(), example, dynamic_shapes=(sizes, sizes, sizes))
    targets = {node.target for node in program.graph.nodes}
    assert OPS.forward.default in targets
    q, k, v = normal(3, 12, 4, 8, seed=4), normal(3, 12, 2, 8, seed=5), normal(3, 12, 2, 8, seed=6)
    assert torch.equal(program.module()(q, k, v), Exported()(q, k, v))


def test_module_exports_with_dynamic_sizes() -> None:
    module = flash_attn_ext.MultiheadAttention(16, 4, batch_first=True, add_zero_attn=True).eval()

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return module(x, x, x, need_weights=False)[0]

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}
    program = torch.export.export(Block(), (normal(2, 7, 16),), dynamic_shapes=(sizes,))
    x = normal(3, 12, 16, seed=1)
    torch.testing.assert_close(program.module()(x), Block()(x))


@pytest.mark.parametrize("call", CALLS)
def test_meta_tensors_know_shapes(call: str) -> None:
    tensors, options = CALLS[call]
    tensors, real = leaves(tensors), OPS.forward(*tensors, *(NO_OPTIONS | options).values())
    meta = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in options.items()}
    fake = OPS.forward(*(x.to("meta") for x in tensors), *(NO_OPTIONS | meta).values())
    for ours, expected in zip(fake, real, strict=True):
        assert ours.device.type == "meta"
        assert (ours.shape, ours.stride(), ours.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_compiled_code_keeps_the_error_rule() -> None:
    """The compiled call in bfloat16 is the eager one, to the bit, and right."""
    q, k, v = (normal(1, 40, 4, 64, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    out = torch.compile(flash_attn_ext.attention, fullgraph=True, backend="aot_eager")(q, k, v, causal=True)
    assert torch.equal(out, flash_attn_ext.attention(q, k, v, causal=True))
    exact = reference.attention(q, k, v, causal=True)
    low = reference.attention(q, k, v, causal=True, dtype=torch.bfloat16)
    assert (out - exact).abs().max().item() <= reference.error_bound(exact, low, torch.bfloat16)
