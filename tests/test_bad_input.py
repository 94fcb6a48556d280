"""Every wrong argument raises an error that lists all unmet constraints, what was given and what would be accepted."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import flash_attn_ext
from flash_attn_ext import InputError, attention, attention_varlen, explain

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_KV, HEAD_DIM = 2, 5, 7, 4, 2, 8


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes: Any) -> dict[str, Any]:
    """A call that is right, but for the changes."""
    q, k, v = (BATCH, SEQLEN_Q, HEADS), (BATCH, SEQLEN_K, HEADS_KV), (BATCH, SEQLEN_K, HEADS_KV)
    return {"q": normal(*q, HEAD_DIM), "k": normal(*k, HEAD_DIM), "v": normal(*v, HEAD_DIM)} | changes


def packed(**changes: Any) -> dict[str, Any]:
    return {
        "q": normal(10, HEADS, HEAD_DIM),
        "k": normal(14, HEADS_KV, HEAD_DIM),
        "v": normal(14, HEADS_KV, HEAD_DIM),
        "cu_seqlens_q": int32(0, 4, 10),
        "cu_seqlens_k": int32(0, 7, 14),
    } | changes


LENGTHS = [normal(3, HEADS, HEAD_DIM), normal(4, HEADS, HEAD_DIM)]
NESTED, JAGGED = (torch.nested.nested_tensor(LENGTHS, layout=layout) for layout in (torch.strided, torch.jagged))

QUANTIZED = torch.quantize_per_tensor(normal(2, 5, 4, 8), 0.1, 0, torch.qint8)

# The changes, and for each unmet constraint a part of its line that has what was given and what is accepted.
DENSE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "q rank 3": (
        {"q": normal(5, 4, 8)},
        ["q must have 4 dimensions (batch, seqlen_q, heads, head_dim), got shape (5, 4"],
    ),
    "q rank 0": ({"q": normal()}, ["q must have 4 dimensions (batch, seqlen_q, heads, head_dim), got shape ()"]),
    "all ranks": (
        {"q": normal(5), "k": normal(1, 2, 3, 4, 5), "v": normal(5, 4)},
        [
            "q must have 4 dimensions (batch, seqlen_q, heads, head_dim), got shape (5,)",
            "k must have 4 dimensions (batch, seqlen_k, heads_kv, head_dim), got shape (1, 2, 3, 4, 5)",
            "v must have 4 dimensions (batch, seqlen_k, heads_kv, head_dim_v), got shape (5, 4)",
        ],
    ),
    "batch of k": (
        {"k": normal(3, 7, 2, 8)},
        ["k must have q's batch and head_dim: shape (2, 7, 2, 8), got shape (3, 7"],
    ),
    "head_dim of k": ({"k": normal(2, 7, 2, 9)}, ["shape (2, 7, 2, 8), got shape (2, 7, 2, 9)"]),
    "rows of v": ({"v": normal(2, 6, 2, 8)}, ["shape (2, 7, 2, 8), got shape (2, 6, 2, 8)"]),
    "heads of v": ({"v": normal(2, 7, 4, 8)}, ["shape (2, 7, 2, 8), got shape (2, 7, 4, 8)"]),
    "head ratio": ({"k": normal(2, 7, 3, 8), "v": normal(2, 7, 3, 8)}, ["heads"]),
    "no heads of k": ({"k": normal(2, 7, 0, 8), "v": normal(2, 7, 0, 8)}, ["heads"]),
    "head_dim 0": ({"q": normal(2, 5, 4, 0), "k": normal(2, 7, 2, 0)}, ["head_dim"]),
    "head_dim 513": ({"q": normal(2, 5, 4, 513), "k": normal(2, 7, 2, 513)}, ["513"]),
    "head_dim_v 0": ({"v": normal(2, 7, 2, 0)}, ["head_dim of v must be in [1, 512], got 0"]),
    "head_dim_v 513": ({"v": normal(2, 7, 2, 513)}, ["513"]),
    "integers": (
        {n: x.int() for n, x in dense().items()},
        ["q must be float64, float32, bfloat16 or float16, got int32"],
    ),
    "dtype of k": ({"k": normal(2, 7, 2, 8).half()}, ["float16"]),
    "dtype of v": ({"v": normal(2, 7, 2, 8).double()}, ["float64"]),
    "device of k": ({"k": torch.empty(2, 7, 2, 8, device="meta")}, ["k must be on q's device cpu, got meta"]),
    "device of a mask": (
        {"mask": torch.empty(5, 7, device="meta").bool()},
        ["mask must be on q's device cpu, got meta"],
    ),
    "device of seqused_k": (
        {"seqused_k": torch.empty(2, dtype=torch.int32, device="meta")},
        ["seqused_k must be on q's device cpu, got meta"],
    ),
    "window below -1": (
        {"window_size": (-2, 0)},
        ["window_size must be two integers (left, right), each -1 (no limit) or"],
    ),
    "window of one": ({"window_size": (3,)}, ["at least 0, got (3,)"]),
    "window no pair": ({"window_size": 3}, ["at least 0, got 3"]),
    "window of 64 bits": (
        {"window_size": (2**63, 0)},
        ["window_size must be below 2**63, got (9223372036854775808, 0)"],
    ),
    "window of floats": ({"window_size": (1.5, 0)}, ["at least 0, got (1.5, 0)"]),
    "window of None": ({"window_size": (None, 0)}, ["at least 0, got (None, 0)"]),
    "probability": ({"dropout_p": 1.1}, ["dropout_p must be in [0, 1], got 1.1"]),
    "negative probability": ({"dropout_p": -0.1}, ["dropout_p must be in [0, 1], got -0.1"]),
    "probability NaN": ({"dropout_p": math.nan}, ["dropout_p must be in [0, 1], got nan"]),
    "softcap": ({"softcap": -1.0}, ["softcap must be finite and at least 0 (0: none), got -1"]),
    "softcap infinite": ({"softcap": math.inf}, ["softcap must be finite and at least 0 (0: none), got inf"]),
    "softcap beyond float32": (
        {"softcap": 1e300},
        ["softcap must be 0 or between 1.17549e-38 and 2.35866e+38, to fit in float32, got 1e+300"],
    ),
    "softcap below float32": (
        {"softcap": 1e-300},
        ["softcap must be 0 or between 1.17549e-38 and 2.35866e+38, to fit in float32, got 1e-300"],
    ),
    "scale beyond float32": (
        {"softmax_scale": -1e308},
        ["softmax_scale must be at most 2.35866e+38 in size, to fit in float32, got -1e+308"],
    ),
    "scale NaN": ({"softmax_scale": math.nan}, ["softmax_scale must be finite, got nan"]),
    "bias shape": (
        {"bias": normal(5, 6)},
        ["(batch, heads, seqlen_q, seqlen_k) = (2, 4, 5, 7), got shape (1, 1, 5, 6)"],
    ),
    "bias heads": ({"bias": normal(2, 5, 7)}, ["= (2, 4, 5, 7), got shape (1, 2, 5, 7)"]),
    "bias rank 5": ({"bias": normal(1, 1, 1, 5, 7)}, ["bias must have 4 dimensions that broadcast to (batch, heads"]),
    "bias dtype": ({"bias": normal(5, 7).half()}, ["bias must be float32, got float16"]),
    "mask shape": (
        {"mask": normal(3, 1, 5, 7) > 0},
        ["mask must broadcast to (batch, heads, seqlen_q, seqlen_k) = ("],
    ),
    "mask dtype": ({"mask": normal(5, 7)}, ["mask must be bool, got float32"]),
    "alibi_slopes": (
        {"alibi_slopes": normal(3)},
        ["alibi_slopes must be float32 of shape (heads,) = (4,) or (batch, heads)"],
    ),
    "alibi_slopes dtype": ({"alibi_slopes": normal(4).double()}, ["got float64 of shape (4,)"]),
    "complex sinks": (
        {"sinks": torch.ones(4).to(torch.complex64)},
        ["sinks must be float32 of shape (heads,) = (4,), got complex64 of shape (4,)"],
    ),
    "sinks of integers": ({"sinks": int32(1, 2, 3, 4)}, ["sinks must be float32 of shape (heads,) = (4,), got int32"]),
    "sinks": ({"sinks": normal(2)}, ["sinks must be float32 of shape (heads,) = (4,), got float32 of shape (2,)"]),
    "seqused_q dtype": (
        {"seqused_q": torch.tensor([1, 2])},
        ["seqused_q must be int32 of shape (batch,) = (2,), got int64"],
    ),
    "seqused_k shape": (
        {"seqused_k": int32(1, 2, 3)},
        ["seqused_k must be int32 of shape (batch,) = (2,), got int32 of"],
    ),
    "seqused_q too long": (
        {"seqused_q": int32(5, 6)},
        ["seqused_q must be between 0 and the sequence's length (5), got 6"],
    ),
    "seqused_k negative": (
        {"seqused_k": int32(-1, 6)},
        ["seqused_k must be between 0 and the sequence's length (7), got -1"],
    ),
    "no tensors": (
        {"q": [[1.0]], "mask": 3, "sinks": "many"},
        [
            "q must be a torch.Tensor, got list [[1.0]]",
            "mask must be a torch.Tensor or None, got int 3",
            "sinks must be a torch.Tensor or None, got str 'many'",
        ],
    ),
    "nested": (
        {"q": NESTED, "k": JAGGED, "bias": NESTED},
        [
            "q must be a torch.Tensor, got a nested tensor",
            "k must be a torch.Tensor, got a nested tensor",
            "bias must be a torch.Tensor or None, got a nested tensor",
        ],
    ),
    "jagged": ({"q": JAGGED}, ["q must be a torch.Tensor, got a nested tensor"]),
    "sparse": (
        {"v": normal(2, 7, 2, 8).to_sparse(), "mask": (normal(5, 7) > 0).to_sparse_csr()},
        [
            "v must be a torch.Tensor, got a tensor of layout torch.sparse_coo",
            "mask must be a torch.Tensor or None, got a tensor of layout torch.sparse_csr",
        ],
    ),
    "numbers too large": ({"softcap": 10**400}, ["softcap must be a number, got int of more than 64 bits"]),
    "no numbers": (
        {"softmax_scale": "big", "softcap": None, "dropout_p": normal(3)},
        [
            "softmax_scale must be a number or None, got str 'big'",
            "softcap must be a number, got None",
            "dropout_p must be a number, got Tensor",
        ],
    ),
    "quantized": ({"q": QUANTIZED}, ["q must be a torch.Tensor, got a quantized tensor of torch.qint8"]),
    "no number among others": (
        {"softmax_scale": "big", "sinks": [1], "mask": normal(5, 7), "window_size": 3, "dropout_p": 2.0},
        [
            "softmax_scale must be a number or None, got str 'big'",
            "sinks must be a torch.Tensor or None, got list [1]",
            "mask must be bool, got float32",
            "window_size must be two integers",
            "dropout_p must be in [0, 1], got 2",
        ],
    ),
    "gradients that there are not": (
        {"alibi_slopes": torch.ones(4, requires_grad=True), "softcap": torch.tensor(-1.0, requires_grad=True)},
        [
            "alibi_slopes has no gradient, and must not require one",
            "softcap has no gradient, and must not require one",
            "softcap must be finite and at least 0 (0: none), got -1",
        ],
    ),
    "many things at once": (
        {
            "k": normal(2, 7, 2, 9),
            "v": normal(2, 7, 2, 8).double(),
            "window_size": (-3, 2),
            "softcap": -2.0,
            "dropout_p": 2.0,
            "bias": normal(3, 3).half(),
            "mask": normal(2, 2),
            "alibi_slopes": normal(9),
            "sinks": normal(9),
            "seqused_k": int32(9, 9),
        },
        [
            "window_size must be",
            "softcap must be",
            "dropout_p must be",
            "k must have q's batch and head_dim",
            "v must have q's dtype",
            "bias must be float32, got float16",
            "bias must broadcast to",
            "mask must be bool",
            "mask must broadcast to",
            "alibi_slopes must be",
            "sinks must be",
            "seqused_k must be",
        ],
    ),
}

PACKED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rank 4": (dense(), [f"{n} must have 3 dimensions" for n in "qkv"]),
    "int64": (
        {"cu_seqlens_q": torch.tensor([0, 4, 10])},
        ["cu_seqlens_q must be int32 of shape (batch + 1,) = (3,), got in"],
    ),
    "two dimensions": (
        {"cu_seqlens_k": int32(0, 7, 14)[None]},
        ["cu_seqlens_k must be int32 of shape (batch + 1,) = (3,)"],
    ),
    "batches differ": (
        {"cu_seqlens_k": int32(0, 14)},
        ["cu_seqlens_k must be int32 of shape (batch + 1,) = (3,), got int32"],
    ),
    "empty": ({"cu_seqlens_q": int32(), "cu_seqlens_k": int32()}, ["cu_seqlens_q must be", "cu_seqlens_k must be"]),
    "not from 0": ({"cu_seqlens_q": int32(1, 4, 10)}, ["cu_seqlens_q must start at 0, got 1"]),
    "decreasing": ({"cu_seqlens_k": int32(0, 9, 7)}, ["cu_seqlens_k must not decrease, got 7 after 9 at index 2"]),
    "negative": ({"cu_seqlens_k": int32(0, -3, 7)}, ["cu_seqlens_k must not decrease, got -3 after 0 at index 1"]),
    "beyond the tensor": (
        {"cu_seqlens_q": int32(0, 4, 11)},
        ["cu_seqlens_q must end at or before 10, the rows of q, got 11"],
    ),
    "beyond in the middle": (
        {"cu_seqlens_k": int32(0, 2_000_000_000, 14)},
        ["cu_seqlens_k must not decrease, got 14 after 2000000000 at index 2"],
    ),
    "max_seqlen": ({"max_seqlen_q": 5}, ["max_seqlen_q must be at least the longest sequence (6), got 5"]),
    "max_seqlen of 64 bits": (
        {"max_seqlen_k": 2**63},
        ["max_seqlen_k must be an integer or None, got int 9223372036854775808, more than 64 bits hold"],
    ),
    "max_seqlen no integer": ({"max_seqlen_k": 7.5}, ["max_seqlen_k must be an integer or None, got float 7.5"]),
    "cu_seqlens no tensor": (
        {"cu_seqlens_k": [0, 7, 14], "softcap": "x"},
        ["cu_seqlens_k must be a torch.Tensor or None, got list [0, 7, 14]", "softcap must be a number, got str 'x'"],
    ),
    "seqused": (
        {"seqused_k": int32(8, 7)},
        ["seqused_k must be between 0 and the sequence's length (7), got 8 at index 0"],
    ),
    "bias does not cover": ({"bias": normal(5, 7)}, ["(2, 4, at least 6, at least 7), got shape (1, 1, 5, 7)"]),
    "no cu_seqlens_q": ({"cu_seqlens_q": None}, ["cu_seqlens_q must be a torch.Tensor, got None"]),
    "many things at once": (
        {
            "k": normal(14, 3, 8),
            "v": normal(14, 3, 8),
            "cu_seqlens_q": int32(1, 0, 11),
            "cu_seqlens_k": torch.tensor([0, 7, 14]),
            "max_seqlen_k": -1,
            "window_size": (0, -2),
        },
        [
            "window_size must be",
            "heads",
            "cu_seqlens_q must start at 0, got 1",
            "cu_seqlens_q must end at or before 10",
            "cu_seqlens_q must not decrease, got 0 after 1",
            "cu_seqlens_k must be int32",
            "max_seqlen_k must be at least 0, got -1",
        ],
    ),
}


def assert_lists(error: InputError, function: str, expected: list[str]) -> None:
    """Exactly the expected constraints, in any order, each on its line of the message."""
    text = "\n".join(error.constraints)
    assert str(error).startswith(f"flash_attn_ext.{function}: ")
    assert all(f"- {line}" in str(error).splitlines() for line in error.constraints)
    for part in expected:
        assert part in text
    assert len(error.constraints) == len(expected), text


@pytest.mark.parametrize("function", [attention, explain])
@pytest.mark.parametrize("name", DENSE)
def test_attention(name: str, function: Callable[..., Any]) -> None:
    """explain does not say that a backend takes what would raise."""
    changes, expected = DENSE[name]
    with pytest.raises(InputError) as raised:
        function(**dense(**changes))
    assert_lists(raised.value, function.__name__, expected)


@pytest.mark.parametrize("function", [attention_varlen, explain])
@pytest.mark.parametrize("name", PACKED)
def test_attention_varlen(name: str, function: Callable[..., Any]) -> None:
    changes, expected = PACKED[name]
    if function is explain and changes == {"cu_seqlens_q": None}:  # which is no mistake without cu_seqlens_k
        expected = ["cu_seqlens_q must be given: a packed call takes cu_seqlens_q and cu_seqlens_k"]
    with pytest.raises(InputError) as raised:
        function(**packed(**changes))
    assert_lists(raised.value, function.__name__, expected)


# What only values, devices and layouts tell.
NOT_OF_FACTS = re.compile("seqused_. (too long|negative)|no numbers|gradients|device|nested|jagged|sparse|quantized")


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", [name for name in DENSE if not NOT_OF_FACTS.match(name)])
def test_attention_of_tensors_without_values(name: str, kind: str) -> None:
    changes, expected = DENSE[name]
    expected = [line for line in expected if line != "seqused_k must be"]
    with FakeTensorMode() if kind == "fake" else nullcontext() as mode:
        to = partial(Tensor.to, device="meta") if mode is None else mode.from_tensor
        call = {name: to(x) if isinstance(x, Tensor) else x for name, x in dense(**changes).items()}
        with pytest.raises(InputError) as raised:
            attention(**call)
    assert_lists(raised.value, "attention", expected)


def test_an_argument_of_a_wrong_kind_is_all_that_is_shown() -> None:
    with pytest.raises(InputError, match="softcap must be a number, got str 'x'") as raised:
        attention(**dense(softcap="x"))
    assert raised.value.__context__ is None


def test_compiled_calls_have_our_error_alone() -> None:
    torch._dynamo.reset()
    with pytest.raises(
        RuntimeError, match=r"^flash_attn_ext\.forward: 1 constraint is not met\n- softcap must [^\n]*$"
    ):
        torch.compile(attention, backend="eager")(**dense(softcap=-1.0))


def test_lengths_without_values_have_no_bound() -> None:
    """A bias covers the longest sequence, however much longer max_seqlen says they may be."""
    q, cu_seqlens = normal(9, 2, 8), torch.tensor([0, 5, 9], dtype=torch.int32)
    options = {"bias": normal(1, 1, 5, 5), "max_seqlen_q": 8}
    expected = attention_varlen(q, q, q, cu_seqlens, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert attention_varlen(q, q, q, cu_seqlens, **options).shape == expected.shape


def test_a_call_that_cannot_run_is_not_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return attention(q, k, k)

    with pytest.raises(InputError, match="heads must be a multiple of k's"):
        torch.export.export(Module(), (normal(2, 5, 4, 8), normal(2, 5, 3, 8)))


def test_mapped_calls_tell_the_shapes_of_a_member() -> None:
    q, bias = normal(3, 2, 5, 4, 8), normal(3, 3, 4, 5, 5)
    with pytest.raises(InputError) as raised:
        torch.vmap(lambda q, bias: attention(q, q, q, bias=bias))(q, bias)
    assert_lists(
        raised.value, "attention", ["(batch, heads, seqlen_q, seqlen_k) = (2, 4, 5, 5), got shape (3, 4, 5, 5)"]
    )
    with pytest.raises(InputError) as raised:
        torch.vmap(torch.vmap(lambda q: attention(q, q, q)))(q)
    assert_lists(raised.value, "attention", [f"{name} must have 4 dimensions" for name in "qkv"])
    assert "got shape (5, 4, 8)" in str(raised.value)
    with pytest.raises(InputError) as raised:
        torch.vmap(lambda q: flash_attn_ext.merge(q, q[..., 0].mT, q, q[..., 0]))(q)
    assert_lists(raised.value, "merge", ["lse_b must be float32 of shape (2, 4, 5), got float32 of shape (2, 5, 4)"])


def test_float64_takes_what_float32_cannot_hold() -> None:
    doubles = {name: x.double() for name, x in dense().items()}
    torch.testing.assert_close(attention(**doubles, softcap=1e300), attention(**doubles))
    small = {**doubles, "k": 1e-300 * doubles["k"]}
    torch.testing.assert_close(attention(**small, softmax_scale=1e300), attention(**doubles, softmax_scale=1.0))


def test_the_calls_before_the_changes_are_right() -> None:
    assert attention(**dense()).isfinite().all()
    assert attention_varlen(**packed()).isfinite().all()


WITHOUT_GRADIENT = {"alibi_slopes": normal(HEADS), "softmax_scale": torch.tensor(0.3), "softcap": torch.tensor(5.0)}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
@pytest.mark.parametrize("function", [attention, attention_varlen, flash_attn_ext.flash_attn_func])
def test_derivatives_that_there_are_not(name: str, function: Callable[..., Any]) -> None:
    """A zero instead would be silent: a parameter that never learns."""
    arguments = packed() if function is attention_varlen else dense()
    given = WITHOUT_GRADIENT[name]

    def call(x: Tensor) -> Tensor:
        return function(**arguments, **{name: x}).sum()

    def dual(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(x, x))

    learning = given.clone().requires_grad_()
    calls: list[Callable[[], Any]] = [
        lambda: call(learning),
        lambda: torch.func.grad(call)(given),
        lambda: torch.func.jvp(call, (given,), (given,)),
        lambda: dual(given),
    ]
    if name == "alibi_slopes":
        calls += [
            lambda: torch.vmap(torch.func.grad(call))(given[None]),
            lambda: torch.func.grad(lambda x: torch.vmap(call)(x).sum())(given[None]),
        ]
    for wrong in calls:
        with pytest.raises(InputError) as raised:
            wrong()
        detach = f"{name} has no gradient, and must not require one: pass {name}.detach()"
        assert_lists(raised.value, function.__name__, [detach])

    expected = call(given)
    arguments["q"].requires_grad_()
    assert torch.equal(call(learning.detach()), expected)
    with torch.no_grad():
        assert torch.equal(call(learning), expected)


def test_compiled_calls_refuse_derivatives_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    slopes = normal(HEADS)
    torch.testing.assert_close(compiled(**dense(), alibi_slopes=slopes), attention(**dense(), alibi_slopes=slopes))
    with pytest.raises(RuntimeError, match="alibi_slopes has no gradient"):
        compiled(**dense(), alibi_slopes=slopes.requires_grad_())
    torch._dynamo.reset()


def test_gradients_are_checked_as_well() -> None:
    """The inputs of a backward come from the forward; called by itself, it checks them all the same."""
    q, k, v = dense().values()
    out, lse = attention(q, k, v, return_lse=True)
    options = [None] * 13
    with pytest.raises(RuntimeError, match=r"flash_attn_ext\.backward: ") as raised:
        torch.ops.flash_attn_ext.backward(
            out[:1], lse[:, :1], q, k, v, out.double(), lse.half(), *options, 0.3, 0.0, 0.0, False, True, True
        )
    for name in ("dout", "dlse", "out", "lse", "bias"):
        raised.match(rf"\n- {name}\b")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"out_b": normal(2, 5, 4, 9)},
            ["out_b must be float32 of shape (2, 5, 4, 8), got float32 of shape (2, 5, 4, 9)"],
        ),
        ({"lse_a": normal(2, 5, 4)}, ["lse_a must be float32 of shape (2, 4, 5), got float32 of shape (2, 5, 4)"]),
        ({"lse_b": normal(2, 4, 5).half()}, ["lse_b must be float32 of shape (2, 4, 5), got float16"]),
        ({"lse_b": 0.0}, ["lse_b must be a torch.Tensor, got float 0.0"]),
        (
            {"out_b": normal(2, 5, 4, 8).double(), "lse_a": normal(1), "lse_b": normal(2)},
            ["out_b must be float32", "lse_a must be float32", "lse_b must be float32"],
        ),
        ({"out_b": torch.empty(2, 5, 4, 8, device="meta")}, ["out_b must be on out_a's device cpu, got meta"]),
    ],
)
def test_merge(change: dict[str, Any], expected: list[str]) -> None:
    arguments = {"out_a": normal(2, 5, 4, 8), "lse_a": normal(2, 4, 5), "out_b": normal(2, 5, 4, 8)}
    with pytest.raises(InputError) as raised:
        flash_attn_ext.merge(**({**arguments, "lse_b": normal(2, 4, 5)} | change))
    assert_lists(raised.value, "merge", expected)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (int32(1, 2), "got int32"),
        ([1.0], "x must be a torch.Tensor, got list"),
    ],
)
def test_softmax(x: Any, expected: str) -> None:
    with pytest.raises(InputError) as raised:
        flash_attn_ext.softmax(x)
    assert_lists(raised.value, "softmax", [expected])


def test_explain_and_backends() -> None:
    with pytest.raises(InputError) as raised:
        explain(normal(5, 4, 8), normal(2, 7, 2, 8), normal(7), window_size=(0, -5))
    assert_lists(
        raised.value, "explain", ["window_size must be", "q must have 4 dimensions", "v must have 4 dimensions"]
    )
    with pytest.raises(InputError, match="device must be 'cpu' or 'cuda', got 'abacus'"):
        explain(**dense(), device="abacus")
    assert explain(**dense(), device="cuda:0").declined.keys() == explain(**dense(), device="cuda").declined.keys()
    with pytest.raises(InputError, match="'abacus'"), flash_attn_ext.backends("abacus"):
        pass


def test_integers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    expected = attention(**dense(), window_size=(2, 0))
    for kind in (numpy.int64, numpy.uint8, torch.tensor):
        assert torch.equal(attention(**dense(), window_size=(kind(2), kind(0))), expected)
    left = (numpy.int64(2), numpy.int64(-5))
    assert torch.equal(
        flash_attn_ext.flash_attn_func(**dense(), window_size=left), attention(**dense(), window_size=(2, -1))
    )
    length = numpy.int64(7)
    assert attention_varlen(**packed(), max_seqlen_q=length, max_seqlen_k=length).isfinite().all()


def test_strides_are_never_wrong() -> None:
    """What looks unusual is taken: last strides other than 1, stride 0, and lengths in strided tensors."""
    q, k, v = dense().values()
    expected = attention(q, k, v, seqused_k=int32(3, 6))
    strided = {"q": q.mT.contiguous().mT, "k": k.flip(-1).flip(-1), "v": torch.stack((v, v), -1)[..., 0]}
    assert torch.equal(attention(**strided, seqused_k=int32(3, 0, 6, 0)[::2]), expected)
    one = k[:, :, :1].expand(-1, -1, 2, -1)
    assert torch.equal(attention(q, one, one), attention(q, one.contiguous(), one.contiguous()))


def test_error_is_a_value_error_and_a_type_error_and_travels() -> None:
    with pytest.raises(InputError) as raised:
        attention(**dense(softcap=-1.0))
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, TypeError)
    assert raised.value.__suppress_context__  # what torch said of it is not shown as well
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (str(copy), copy.constraints) == (str(raised.value), raised.value.constraints)


def test_other_errors_pass_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(torch, "randint", fail)
    with pytest.raises(MemoryError, match="no memory"):
        attention(**dense(dropout_p=0.5))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"softcap": -1.0}, "- softcap must be finite and at least 0 (0: none), got -1"),  # of the op, in the graph
        ({"window_size": (-4, 0)}, " window_size must be two integers (left, right), each -1 (no limit) or at least 0"),
    ],
    ids=str,
)
def test_compiled_calls_list_constraints_too(wrong: dict[str, Any], line: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=fullgraph, backend="eager")
    with pytest.raises(Exception, match=re.escape(line)):
        compiled(**dense(**wrong))
