"""torch's tools around the ops: FLOP counter, profiler, fake tensors, selective checkpointing, inductor."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from flash_attn_ext import attention, attention_varlen

OPS = torch.ops.flash_attn_ext
CXX = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(CXX is None, reason="inductor needs a C++ compiler")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(seqlen_q: int = 10, seqlen_k: int = 12, requires_grad: bool = False) -> list[Tensor]:
    shapes = (2, seqlen_q, 4, 8), (2, seqlen_k, 2, 8), (2, seqlen_k, 2, 6)
    return [normal(*shape, seed=i).requires_grad_(requires_grad) for i, shape in enumerate(shapes)]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- FLOP counter ---------------------------------------------------------------------------------------------------


def counted(call: partial[Tensor]) -> tuple[int, int]:
    """FLOPs of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        out = call()
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops() - forward


def by_hand(pairs: int, heads: int = 4, head_dim: int = 8, head_dim_v: int = 6) -> tuple[int, int]:
    return 2 * pairs * heads * (head_dim + head_dim_v), 2 * pairs * heads * (3 * head_dim + 2 * head_dim_v)


def test_flops_of_full_attention_are_torchs() -> None:
    q, k, v = qkv(requires_grad=True)
    shapes = [(x.shape[0], q.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
    out_shape = (*shapes[0][:3], 6)
    expected = sdpa_flop_count(*shapes), sdpa_backward_flop_count(out_shape, *shapes)
    assert counted(partial(attention, q, k, v)) == expected == by_hand(2 * 10 * 12)


WINDOWS = ({"causal": True}, {"window_size": (3, 1)}, {"window_size": (0, -1)}, {"causal": True, "window_size": (2, 0)})


@pytest.mark.parametrize("options", WINDOWS)
@pytest.mark.parametrize("sizes", [(10, 12), (12, 10), (7, 7)])
def test_flops_within_a_window(options: dict[str, object], sizes: tuple[int, int]) -> None:
    q, k, v = qkv(*sizes, requires_grad=True)
    _, lse = attention(torch.zeros_like(q), torch.zeros_like(k), v, return_lse=True, **options)
    pairs = round(lse.exp().sum().item() / 4)  # equal scores: e^lse counts the keys that a row sees
    assert counted(partial(attention, q, k, v, **options)) == by_hand(pairs)


@pytest.mark.parametrize("window", [(sys.maxsize, sys.maxsize), (0, sys.maxsize), (sys.maxsize, 0)])
def test_flops_within_a_window_without_limits(window: tuple[int, int]) -> None:
    q, k, v = qkv(requires_grad=True)
    same = tuple(-1 if side == sys.maxsize else side for side in window)
    expected = counted(partial(attention, q, k, v, window_size=same))
    assert counted(partial(attention, q, k, v, window_size=window)) == expected


def test_flops_of_lengths() -> None:
    q, k, v = qkv(requires_grad=True)
    used = {f"seqused_{side}": torch.tensor(x, dtype=torch.int32) for side, x in (("q", (10, 4)), ("k", (3, 12)))}
    assert counted(partial(attention, q, k, v, **used)) == by_hand(10 * 3 + 4 * 12)
    rows = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    starts = [torch.tensor(x, dtype=torch.int32) for x in ((0, 5, 18), (0, 9, 20))]
    assert counted(partial(attention_varlen, *rows, *starts)) == by_hand(5 * 9 + 13 * 11)
    causal = sum(9 - 4 + i for i in range(5)) + sum(max(0, 11 - 12 + i) for i in range(13))
    assert counted(partial(attention_varlen, *rows, *starts, causal=True)) == by_hand(causal)


def test_flops_of_tensors_without_values() -> None:
    q, k, v = (x.to("meta") for x in qkv())
    assert counted(partial(attention, q, k, v, causal=True))[0] == by_hand(2 * (10 * 12 - 45))[0]
    with FakeTensorMode() as mode:
        rows = [mode.from_tensor(x.flatten(0, 1)) for x in qkv()]
        starts = [mode.from_tensor(torch.tensor([0, 9, 20], dtype=torch.int32)) for _ in range(2)]
        assert counted(partial(attention_varlen, *rows, *starts))[0] == by_hand(2 * 10 * 12)[0]


# ---- Profiler, fake tensors, selective checkpointing ----------------------------------------------------------------


def test_names_in_the_profiler() -> None:
    q, k, v = qkv(requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, k, v).sum().backward()
    names = [event.key for event in profile.key_averages()]
    assert {"flash_attn_ext::forward", "flash_attn_ext::backward", "AttentionBackward"} <= set(names)


def test_fake_tensors_train() -> None:
    """A whole step on tensors without memory: shapes, strides and dtypes of results and gradients."""
    real = qkv(requires_grad=True)
    bias = normal(1, 4, 1, 12).requires_grad_()
    expected = attention(*real, bias=bias, return_lse=True)
    gradients = torch.autograd.grad(expected[0].sum() + expected[1].sum(), [*real, bias])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (*real, bias)]
        out, lse = attention(*fakes[:3], bias=fakes[3], return_lse=True)
        own = torch.autograd.grad(out.sum() + lse.sum(), fakes)
    for fake, x in zip((out, lse, *own), (*expected, *gradients), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (x.shape, x.stride(), x.dtype)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_selective_checkpointing(saved: bool, compiled: bool) -> None:
    """A policy that saves our op runs its forward once; one that doesn't, twice."""
    q, k, v = qkv(requires_grad=True)

    def policy(_: object, op: object, *args: object, **options: object) -> CheckpointPolicy:
        ours = saved and op == OPS.forward.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.sin(), k, v, causal=True).cos()

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts)

    expected = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    function = torch.compile(checkpointed, fullgraph=True, backend="aot_eager") if compiled else checkpointed
    function(q, k, v)
    # Both counters name the op; torch.compile refuses the one, and the checkpoint's own modes show twice in the other.
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler if compiled else FlopCounterMode(display=False) as counter:
        own = torch.autograd.grad(function(q, k, v).sum(), (q, k, v))
    torch.testing.assert_close(own, expected)
    if compiled:
        (runs,) = (event.count for event in counter.key_averages() if event.key == "flash_attn_ext::forward")
    else:
        runs = counter.get_flop_counts()["Global"][OPS.forward] / counted(partial(attention, q, k, v, causal=True))[0]
    assert runs == (1 if saved else 2)


# ---- Inductor -------------------------------------------------------------------------------------------------------


@needs_compiler
def test_max_autotune() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, causal=True).sin()

    q, k, v = qkv(requires_grad=True)
    expected = block(q, k, v)
    out = torch.compile(block, fullgraph=True, mode="max-autotune")(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), rtol=1e-4, atol=1e-5
    )
