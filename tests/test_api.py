"""What the public functions do around the ops: conventions, autograd, torch.func, autocast, explain, the commands."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import flash_attn_ext
from flash_attn_ext import __main__ as commands
from flash_attn_ext import attention, attention_varlen, merge, ops, reference, softmax, verify

# Sums of under 100 float64 terms of order 1, added up in two orders, differ by less than 1e-13.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

RAW = torch.ops.flash_attn_ext


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)
    q, k, v = (normal(*shape, seed=seed).requires_grad_(requires_grad) for seed, shape in enumerate(shapes, 1))
    return q, k, v


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- Conventions ----------------------------------------------------------------------------------------------------


def test_options_are_keyword_only_and_the_same_everywhere() -> None:
    """The fourth positional argument means different things in different packages, so there is none."""
    signatures = {f: inspect.signature(f).parameters for f in (attention, attention_varlen, flash_attn_ext.explain)}
    options = {n: p.default for n, p in signatures[attention].items() if p.kind is p.KEYWORD_ONLY}
    assert [n for n in signatures[attention] if n not in options] == ["q", "k", "v"]
    for parameters in signatures.values():
        own = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert own.items() >= options.items()


def test_everything_public_is_documented() -> None:
    for name in flash_attn_ext.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(flash_attn_ext, name)), name


@pytest.mark.parametrize(
    ("causal", "window_size", "window"),
    [
        (False, (-1, -1), (None, None)),
        (True, (-1, -1), (None, 0)),
        (True, (3, 5), (3, 0)),
        (True, (-1, 5), (None, 0)),
        (False, (3, -1), (3, None)),
        (False, [0, 2], (0, 2)),
    ],
)
def test_window_conventions(causal: bool, window_size: Any, window: tuple[int | None, int | None]) -> None:
    q, k, v = qkv()
    expected = reference.attention(q, k, v, window=window)
    torch.testing.assert_close(attention(q, k, v, causal=causal, window_size=window_size), expected, **CLOSE)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (4, 1, 1), (4, 5, 7), (1, 4, 5, 1), (2, 4, 5, 7)])
def test_bias_and_mask_broadcast_from_fewer_dimensions(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    bias = normal(*shape, seed=4).requires_grad_()
    mask = normal(*shape, seed=5) > -0.5
    expected = reference.attention(q, k, v, bias=bias, mask=mask)
    out = attention(q, k, v, bias=bias, mask=mask)
    torch.testing.assert_close(out, expected, **CLOSE)
    gradients = [torch.autograd.grad(x.sin().sum(), bias)[0] for x in (out, expected)]
    assert gradients[0].shape == shape
    torch.testing.assert_close(*gradients, **CLOSE)


def test_packed_keys_default_to_the_queries() -> None:
    q, cu_seqlens = normal(12, 4, 8), int32(0, 5, 12)
    both = attention_varlen(q, q, q, cu_seqlens, cu_seqlens, max_seqlen_q=7, max_seqlen_k=7, causal=True)
    assert torch.equal(attention_varlen(q, q, q, cu_seqlens, causal=True), both)
    assert torch.equal(attention_varlen(q, q, q, cu_seqlens, max_seqlen_q=7, causal=True), both)


def test_dropout_follows_torchs_generator() -> None:
    q, k, v = qkv()
    torch.manual_seed(11)
    first = attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(11)
    rng_state = torch.randint(2**63 - 1, (2,), dtype=torch.int64)
    torch.testing.assert_close(first, reference.attention(q, k, v, dropout_p=0.4, rng_state=rng_state), **CLOSE)
    assert not torch.equal(attention(q, k, v, dropout_p=0.4), first)
    before = torch.get_rng_state()
    attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn without dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sinks_of_any_dtype(dtype: torch.dtype) -> None:
    """A model in bfloat16 keeps its sinks in bfloat16; their gradient comes back in it."""
    q, k, v = qkv()
    sinks = normal(4).to(dtype).requires_grad_()
    out = attention(q, k, v, sinks=sinks)
    torch.testing.assert_close(out, reference.attention(q, k, v, sinks=sinks.double()), **CLOSE)
    (gradient,) = torch.autograd.grad(out.sum(), sinks)
    assert gradient.dtype == dtype
    assert gradient.count_nonzero() == 4


# ---- Autograd -------------------------------------------------------------------------------------------------------

LEAVES = ("q", "k", "v", "bias", "sinks")


@pytest.mark.parametrize("wanted", [*((name,) for name in LEAVES), ("q", "sinks"), ("bias", "v"), LEAVES])
def test_gradients_of_what_requires_them(wanted: tuple[str, ...]) -> None:
    inputs = dict(zip(LEAVES, (*qkv(), normal(1, 4, 5, 7), normal(4)), strict=True))
    for name in wanted:
        inputs[name].requires_grad_()
    leaves = [inputs[name] for name in wanted]
    own = torch.autograd.grad(attention(**inputs).sin().sum(), leaves)
    expected = torch.autograd.grad(reference.attention(**inputs).sin().sum(), leaves)
    torch.testing.assert_close(own, expected, **CLOSE)


@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_gradients_through_out_and_lse(through: str) -> None:
    q, k, v = qkv(requires_grad=True)

    def loss(function: Callable[..., Any]) -> Tensor:
        out, lse = function(q, k, v, causal=True, sinks=torch.zeros(4, dtype=torch.float64), return_lse=True)
        return {"out": out.sin().sum(), "lse": lse.cos().sum(), "both": out.sin().sum() + lse.cos().sum()}[through]

    gradients = (
        torch.autograd.grad(loss(f), (q, k, v), materialize_grads=True) for f in (attention, reference.attention)
    )
    torch.testing.assert_close(*gradients, **CLOSE)


def test_gradcheck() -> None:
    q, k, v = (x[:1, :3].detach().requires_grad_() for x in qkv())
    assert gradcheck(lambda *x: attention(*x, causal=True, softcap=2.0, return_lse=True), (q, k, v))
    assert gradcheck(merge, [x.requires_grad_() for x in merge_inputs()])
    x = normal(3, 5).requires_grad_()
    assert gradcheck(softmax, x)
    assert gradgradcheck(softmax, x)


def merge_inputs() -> list[Tensor]:
    return [normal(1, 3, 2, 4), normal(1, 2, 3, seed=1), normal(1, 3, 2, 4, seed=2), normal(1, 2, 3, seed=3)]


def test_no_gradient_is_recorded_without_need() -> None:
    q, k, v = qkv()
    assert not attention(q, k, v).requires_grad
    q, k, v = qkv(requires_grad=True)
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert attention(q, k, v).is_inference()


def test_merge_is_attention_over_both_sets_of_keys() -> None:
    q, k, v = qkv(requires_grad=True)
    halves = [attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(3), slice(3, None))]
    found, whole = merge(*halves[0], *halves[1]), attention(q, k, v, return_lse=True)
    torch.testing.assert_close(found, whole, **CLOSE)
    gradients = [torch.autograd.grad(out.sin().sum() + lse.cos().sum(), (q, k, v)) for out, lse in (found, whole)]
    torch.testing.assert_close(*gradients, **CLOSE)
    packed = merge(*(x[0] for half in halves for x in half))
    torch.testing.assert_close(packed, tuple(x[0] for x in whole), **CLOSE)


def test_raw_ops_train_too() -> None:
    q, k, v = qkv(requires_grad=True)
    out, lse = RAW.forward(q, k, v, *[None] * 12, 0, 0.3, 0.0, 0.0, False)
    expected = reference.attention(q, k, v, causal=True, softmax_scale=0.3, return_lse=True)
    torch.testing.assert_close((out, lse), expected, **CLOSE)
    pairs = (out, lse), expected
    gradients = (torch.autograd.grad(o.sin().sum() + s.cos().sum(), (q, k, v)) for o, s in pairs)
    torch.testing.assert_close(*gradients, **CLOSE)


# ---- torch.func -----------------------------------------------------------------------------------------------------


def loss_of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    out, lse = attention(q, k, v, causal=True, bias=bias, return_lse=True)
    return out.sin().sum() + lse.cos().sum()


def test_func_grad() -> None:
    own = torch.func.grad(loss_of, argnums=(0, 1, 2))(*qkv())
    q, k, v = qkv(requires_grad=True)
    torch.testing.assert_close(own, torch.autograd.grad(loss_of(q, k, v), (q, k, v)), rtol=0, atol=0)
    for function, inputs in ((softmax, [normal(3, 5)]), (lambda *x: merge(*x)[0], merge_inputs())):
        found = torch.func.grad(lambda *x, f=function: f(*x).sin().sum())(*inputs)
        leaf = inputs[0].clone().requires_grad_()
        expected = torch.autograd.grad(function(leaf, *inputs[1:]).sin().sum(), leaf)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_func_second_derivatives() -> None:
    x = normal(3, 5)
    expected = torch.func.hessian(lambda x: torch.softmax(x, -1).sin().sum())
    own = torch.func.jacrev(torch.func.jacrev(lambda x: softmax(x).sin().sum()))
    torch.testing.assert_close(own(x), expected(x), **CLOSE)


def test_jacrev() -> None:
    q, k, v = (x[:1, :2] for x in qkv())
    expected = torch.autograd.functional.jacobian(lambda q: attention(q, k, v), q)
    torch.testing.assert_close(torch.func.jacrev(lambda q: attention(q, k, v))(q), expected, **CLOSE)


# What is mapped over, as a dimension for each tensor: a member of the map has what is left.
N = 3
DENSE = {"q": (2, 5, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 6)}
MAPS: dict[str, dict[str, tuple[tuple[int, ...], int | None]]] = {
    "all": {name: ((N, *shape), 0) for name, shape in DENSE.items()},
    "queries": {"q": ((N, 2, 5, 4, 8), 0), "k": (DENSE["k"], None), "v": (DENSE["v"], None)},
    "keys, inner dimensions": {"q": (DENSE["q"], None), "k": ((2, 7, N, 2, 8), 2), "v": ((2, 7, 2, 6, N), 4)},
    "bias for all": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "bias": ((1, 4, 5, 7), None)},
    "bias of the batch for all": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "bias": ((2, 1, 5, 7), None)},
    "bias of each": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "bias": ((4, 5, N, 7), 2)},
    "only the bias": {**{n: (s, None) for n, s in DENSE.items()}, "bias": ((N, 2, 1, 5, 1), 0)},
    "slopes for all": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "alibi_slopes": ((4,), None)},
    "slopes of the batch": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "alibi_slopes": ((2, 4), None)},
    "slopes of each": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "alibi_slopes": ((4, N), 1)},
    "slopes of each batch": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "alibi_slopes": ((N, 2, 4), 0)},
    "sinks for all": {**{n: ((N, *s), 0) for n, s in DENSE.items()}, "sinks": ((4,), None)},
}


def mapped(name: str) -> tuple[list[Tensor], tuple[int | None, ...], Callable[..., Tensor], list[list[Tensor]]]:
    """The arguments, in_dims, a function of one member, and each member's own arguments."""
    names = list(MAPS[name])
    arguments = [normal(*shape, seed=seed) for seed, (shape, _) in enumerate(MAPS[name].values())]
    arguments = [x.abs().float() if n == "alibi_slopes" else x for n, x in zip(names, arguments, strict=True)]
    in_dims = tuple(dim for _, dim in MAPS[name].values())

    def member(*tensors: Tensor) -> Tensor:
        return attention(**dict(zip(names, tensors, strict=True)), causal=True)

    members = [
        [x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)] for i in range(N)
    ]
    return arguments, in_dims, member, members


@pytest.mark.parametrize("name", MAPS)
def test_vmap(name: str) -> None:
    arguments, in_dims, member, members = mapped(name)
    expected = torch.stack([member(*own) for own in members])
    torch.testing.assert_close(torch.vmap(member, in_dims)(*arguments), expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in MAPS if not name.startswith(("sinks", "slopes"))])
def test_gradients_per_member(name: str) -> None:
    """vmap over grad: what members share has a gradient in each of them."""
    arguments, in_dims, member, members = mapped(name)
    gradient = torch.func.grad(lambda *x: member(*x).sin().sum(), argnums=tuple(range(len(arguments))))
    expected = [torch.stack(parts) for parts in zip(*(gradient(*own) for own in members), strict=True)]
    torch.testing.assert_close(list(torch.vmap(gradient, in_dims)(*arguments)), expected, **CLOSE)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("through_func", [False, True])
def test_gradient_of_a_map(name: str, through_func: bool) -> None:
    """grad over vmap, by torch.func and by autograd outside of it."""
    arguments, in_dims, member, members = mapped(name)
    places = [i for i, x in enumerate(arguments) if x.dtype == torch.float64]
    if through_func:
        loss = lambda *x: torch.vmap(member, in_dims)(*x).sin().sum()  # noqa: E731
        own = list(torch.func.grad(loss, argnums=tuple(places))(*arguments))
    else:
        leaves = [x.clone().requires_grad_(i in places) for i, x in enumerate(arguments)]
        total = torch.vmap(member, in_dims)(*leaves).sin().sum()
        own = list(torch.autograd.grad(total, [leaves[i] for i in places]))
    gradient = torch.func.grad(lambda *x: member(*x).sin().sum(), argnums=tuple(places))
    parts = list(zip(*(gradient(*each) for each in members), strict=True))
    dims = [in_dims[i] for i in places]
    expected = [sum(p) if dim is None else torch.stack(p, dim) for p, dim in zip(parts, dims, strict=True)]
    torch.testing.assert_close(own, expected, **CLOSE)


def test_vmap_with_lengths_and_masks() -> None:
    q, k, v = (torch.stack([x, x.flip(1), -x]) for x in qkv())
    used = torch.stack([int32(5, 3), int32(1, 4), int32(0, 2)])
    mask = normal(N, 5, 7) > -0.5
    call = lambda q, k, v, used, mask: attention(q, k, v, seqused_q=used, mask=mask)  # noqa: E731
    expected = torch.stack([call(*each) for each in zip(q, k, v, used, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(q, k, v, used, mask), expected, **CLOSE)


def test_vmap_of_merge_and_softmax() -> None:
    tensors = [torch.stack([x, x.flip(1), -x], 1) for x in merge_inputs()]
    expected = torch.stack([merge(*(x[:, i] for x in tensors))[0] for i in range(N)])
    own = torch.vmap(lambda *x: merge(*x)[0], in_dims=1)
    torch.testing.assert_close(own(*tensors), expected, **CLOSE)
    packed = [x[0, 0] for x in tensors]  # one block for all members of the map
    shared = torch.vmap(lambda a, b: merge(a, b, *packed[2:])[0])(*(x[0] for x in tensors[:2]))
    expected = torch.stack([merge(tensors[0][0, i], tensors[1][0, i], *packed[2:])[0] for i in range(N)])
    torch.testing.assert_close(shared, expected, **CLOSE)
    gradient = torch.func.grad(lambda *x: merge(*x)[0].sin().sum())
    expected = torch.stack([gradient(*(x[:, i] for x in tensors)) for i in range(N)])
    torch.testing.assert_close(torch.vmap(gradient, in_dims=1)(*tensors), expected, **CLOSE)
    x = normal(3, 5, 4)
    torch.testing.assert_close(torch.vmap(softmax, in_dims=2)(x), torch.softmax(x.movedim(2, 0), -1), **CLOSE)
    per_row = torch.func.grad(lambda x: softmax(x).sin().sum())
    expected = torch.func.grad(lambda x: torch.softmax(x, -1).sin().sum())(x)
    torch.testing.assert_close(torch.vmap(torch.vmap(per_row))(x), expected, **CLOSE)


def test_vmap_of_the_raw_ops() -> None:
    q, k, v = qkv()
    queries = torch.stack([q, -q])
    call = lambda q: RAW.forward(q, k, v, *[None] * 13, 0.3, 0.0, 0.0, False)[0]  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(queries), torch.stack([call(q), call(-q)]), **CLOSE)


def test_vmap_with_dropout() -> None:
    """randomness='different': each member drops its own elements, and no two maps the same."""
    q, k, v = qkv()
    queries = q.expand(N, *q.shape)
    call = torch.vmap(lambda q: attention(q, k, v, dropout_p=0.5), randomness="different")
    torch.manual_seed(2)
    first = call(queries)
    torch.manual_seed(2)
    assert torch.equal(call(queries), first)
    assert not torch.equal(first[0], first[1])


def test_vmap_with_one_call_each() -> None:
    """Packed sequences of each, sinks of each, gradients of sinks, and the same dropout for all."""
    q, k, v = qkv()
    queries, sinks = torch.stack([q, q.flip(1), -q]), normal(N, 4)
    lengths = torch.stack([int32(0, 2, 5), int32(0, 4, 4), int32(0, 1, 3)])
    call = lambda q, cu: attention_varlen(q, q, q, cu)  # noqa: E731
    expected = torch.stack([call(*each) for each in zip(queries[:, 0], lengths, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(queries[:, 0], lengths), expected, **CLOSE)
    loss = lambda q, sinks: attention(q, k, v, sinks=sinks).sin().sum()  # noqa: E731
    gradient = torch.func.grad(loss, argnums=(0, 1))
    expected = [torch.stack(x) for x in zip(*map(gradient, queries, sinks), strict=True)]
    torch.testing.assert_close(list(torch.vmap(gradient)(queries, sinks)), expected, **CLOSE)
    same = torch.vmap(lambda q: attention(q, k, v, dropout_p=0.5), randomness="same")(q.expand(N, *q.shape))
    assert torch.equal(same[0], same[1])
    assert not torch.allclose(same[0], attention(q, k, v))


# ---- Autocast, explain, backends ------------------------------------------------------------------------------------


def test_autocast_takes_its_dtype() -> None:
    q, k, v = (x.float().requires_grad_() for x in qkv())
    bias, sinks = normal(5, 7).float().requires_grad_(), normal(4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention(q, k, v, bias=bias, sinks=sinks, return_lse=True)
        expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, :2], k[:, :5], k[:, :5])
        wide = attention(*qkv())
        mixed = attention(q.half(), k, v, bias=bias.half())
    assert (out.dtype, lse.dtype, wide.dtype, mixed.dtype) == (
        expected.dtype,
        torch.float32,
        torch.float64,
        expected.dtype,
    )
    low = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, attention(*low, bias=bias, sinks=sinks))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v, bias)))
    with torch.autocast("cpu", enabled=False):
        assert attention(q, k, v).dtype == torch.float32


def test_explain_names_the_backend_and_reads_well() -> None:
    q, k, v = qkv()
    found = flash_attn_ext.explain(q, k, v, causal=True, sinks=normal(4))
    assert found.backend == "cpu"
    assert (found.kernel or "").startswith("forward")
    assert (found.backward_kernel or "").startswith("backward")
    assert str(found).splitlines()[0] == f"cpu: {found.kernel}; {found.backward_kernel}"
    on_meta = flash_attn_ext.explain(*(x.to("meta") for x in (q, k, v)), causal=True)
    assert on_meta == flash_attn_ext.explain(q, k, v, causal=True)
    packed = flash_attn_ext.explain(q[0], k[0], v[0], int32(0, 5), int32(0, 7))
    assert packed.backend == "cpu"
    lengths = (int32(0, 5), int32(0, 7))
    assert flash_attn_ext.explain(*(x[0].to("meta") for x in (q, k, v)), *lengths) == packed


def test_explain_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert flash_attn_ext.explain(*qkv(), dropout_p=0.5).backend == "cpu"
    assert torch.equal(torch.get_rng_state(), before)


def test_explain_of_nothing() -> None:
    """No keys, no heads, no batch: what attention takes is explained, and nothing divides by zero."""
    q, k, v = qkv()
    for given in ((q, k[:, :0], v[:, :0]), (q[:, :0], k, v), (q[:0], k[:0], v[:0])):
        assert flash_attn_ext.explain(*given).backend == "cpu"
    assert flash_attn_ext.explain(q[:, :, :0], k[:, :, :0], v[:, :, :0]).backend == "cpu"
    sizes = {"batch": 1, "seqlen_q": 1, "seqlen_k": 0, "heads": 4, "heads_kv": 0, "head_dim": 8, "head_dim_v": 8}
    assert flash_attn_ext._C.explain(device="cpu", dtype="float32", **sizes)[0]["accepted"]


def test_explain_says_why_nobody_takes_a_call() -> None:
    q, k, v = qkv()
    found = flash_attn_ext.explain(q.float(), k.float(), v.float(), device="cuda")
    if not torch.cuda.is_available():
        assert found.backend is found.kernel is None
        declined = "cpu declines: it runs on CPU tensors, the tensors are on CUDA"
        assert str(found).startswith(f"no backend takes this call\n{declined}")


def test_backends_limits_and_restores() -> None:
    before = flash_attn_ext.explain(*qkv())
    with flash_attn_ext.backends("cpu"):
        assert flash_attn_ext.explain(*qkv()).backend == "cpu"
        with flash_attn_ext.backends():
            pass
        assert flash_attn_ext._C.backends() == ["cpu"]
    assert flash_attn_ext._C.backends() == []
    assert flash_attn_ext.explain(*qkv()) == before


# ---- Commands and import --------------------------------------------------------------------------------------------


def test_info_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"flash_attn_ext       {flash_attn_ext.__version__}" in text
    assert torch.__version__ in text
    assert ops.cuda_library_status in text
    level = flash_attn_ext._C.build_info()["cpu_level"]
    assert f"instruction-set level {level} of" in text


def test_verify_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("pass") for line in lines) >= 20
    assert lines[-1].startswith("all ")


def test_verify_fails_where_something_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "softmax", lambda x: softmax(x) * 2)
    monkeypatch.setattr(verify, "merge", lambda *x, **y: tuple(z * float("nan") for z in merge(*x, **y)))
    monkeypatch.setattr(verify, "_attention_cases", lambda *_: iter(()))
    assert commands.main(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("pass") for line in lines)
    count = sum(line.startswith("FAIL") for line in lines)
    assert count >= 6
    assert lines[-1] == f"{count} of {count} checks FAILED"


def test_explain_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "2", "--seqlen-q", "64", "--heads", "8", "--heads-kv", "2", "--dtype", "float32"]
    assert commands.main(["explain", *sizes, "--causal", "--bias", "--device", "cpu", "--window", "9", "0"]) == 0
    assert capsys.readouterr().out.startswith("cpu: forward")
    for wrong in (["--nonsense"], ["--batch", "-1"]):
        with pytest.raises(SystemExit):
            commands.main(["explain", *wrong])


def test_explain_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["explain", "--heads", "8", "--heads-kv", "0"]) == 2
    assert "q's heads must be a multiple of k's (0), got 8" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "answer"), [("demo", "--parts"), ("bench", "--suite")])
def test_demo_and_bench_hand_their_arguments_on(command: str, answer: str) -> None:
    """Each answers for itself, in a process as a user starts it."""
    if command == "bench" and not (Path(commands.__file__).parents[1] / "benchmarks").exists():
        pytest.skip("the package under test is not in its source tree, and the benchmark is nowhere else")
    done = subprocess.run(
        [sys.executable, "-m", "flash_attn_ext", command, "--help"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert answer in done.stdout


def test_import_without_the_library_says_how_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "libflash_attn_ext.so")
    with pytest.raises(
        ImportError, match=r"needs its compiled libraries \(.*No such file.*\): build them with"
    ) as raised:
        ops._load()
    assert "\n" not in str(raised.value)


def test_a_broken_cuda_library_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(ops, "CUDA_LIBRARY", tmp_path / "libflash_attn_ext_cuda.so")
    assert ops._load_cuda().startswith("not built: ")
    ops.CUDA_LIBRARY.write_text("no library")
    with pytest.warns(UserWarning, match="runs without CUDA"):
        assert ops._load_cuda().startswith("not loaded: ")
