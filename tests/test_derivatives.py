"""Derivatives of every order and mode: forward mode, double backward, torch.func; with every option; their memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import LEAVES, Case
from test_gradcheck import OPTIONS, without_nan
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn_ext import InputError, attention, attention_varlen, derivatives, merge, reference, softmax
from flash_attn_ext.attention import attend

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
Function = Callable[..., tuple[Tensor, Tensor]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def function_of(case: Case, ours: bool) -> tuple[Function, tuple[Tensor, ...]]:
    """(out, lse) of a case as a function of what is differentiable in it."""
    inputs = {name: None if t is None else without_nan(t) for name, t in case.make().items()}
    names = [name for name in LEAVES if inputs[name] is not None]
    fixed = {name: t for name, t in inputs.items() if name not in (*names, "dout", "dlse")}
    numbers = {"window": (case.window_left, case.window_right), "softmax_scale": case.scale}
    numbers |= {"softcap": case.softcap, "dropout_p": case.dropout_p}

    def function(*variables: Tensor) -> tuple[Tensor, Tensor]:
        given = fixed | dict(zip(names, variables, strict=True))
        if ours:
            out, lse = attend("attention", given.pop("q"), given.pop("k"), given.pop("v"), **given, **numbers)
        else:
            given = {name: t for name, t in given.items() if t is not None}
            oracle = reference.attention_varlen if case.packed else reference.attention
            out, lse = oracle(**given, **numbers, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    return function, tuple(inputs[name] for name in names)


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_second_derivatives_of_every_option(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """jvp, jvp of the gradient and gradient of the gradient, beside those of the specification."""
    monkeypatch.setattr(derivatives, "TILE", 16)
    results = []
    for ours in (True, False):
        function, variables = function_of(case, ours)
        directions = tuple(normal(*x.shape, seed=i) for i, x in enumerate(variables))

        def gradient(*x: Tensor, function: Function = function) -> tuple[Tensor, ...]:
            def loss(*x: Tensor) -> Tensor:
                out, lse = function(*x)
                return out.sin().sum() + lse.cos().sum()

            return torch.func.grad(loss, argnums=tuple(range(len(x))))(*x)

        first = torch.func.jvp(function, variables, directions)[1]
        forward_over_reverse = torch.func.jvp(gradient, variables, directions)[1]
        leaves = tuple(x.clone().requires_grad_() for x in variables)
        out, lse = function(*leaves)
        once = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves, create_graph=True)
        twice = torch.autograd.grad(once, leaves, directions)
        torch.testing.assert_close(twice, forward_over_reverse, **CLOSE)  # the Hessian is symmetric
        results.append((first, forward_over_reverse))
    torch.testing.assert_close(*results, **CLOSE)


CHECKED = ("plain", "rows that see nothing", "sinks and masked rows", "packed", "dropout", "everything")


@pytest.mark.parametrize("name", CHECKED)
def test_gradgradcheck(name: str) -> None:
    """Against finite differences: no formula of ours on the other side."""
    case = OPTIONS[name].but(batch=1) if not OPTIONS[name].packed else OPTIONS[name]
    function, variables = function_of(case.but(heads=2, heads_kv=1, seqlen_q=min(case.seqlen_q, 4)), ours=True)
    leaves = tuple(x.clone().requires_grad_() for x in variables)
    tolerance = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-5}
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False, **tolerance)
    both = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "fast_mode": name == "everything"}
    assert torch.autograd.gradgradcheck(function, leaves, **both, **tolerance)


def test_every_order_of_modes() -> None:
    """Hessians and third derivatives by every sequence of forward and reverse mode, through nested vmaps."""
    q, k, v = normal(1, 3, 2, 2), normal(1, 4, 1, 2, seed=1), normal(1, 4, 1, 2, seed=2)
    sinks = normal(2, seed=3)

    def loss(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def of_keys(k: Tensor) -> Tensor:
            out, lse = function(q * k[:, :3], k, v, causal=True, sinks=sinks, return_lse=True)
            return out.sin().sum() + lse.cos().sum()

        return of_keys

    modes = (torch.func.jacfwd, torch.func.jacrev)
    exact = torch.func.hessian(loss(reference.attention))
    for outer, inner in itertools.product(modes, modes):
        torch.testing.assert_close(outer(inner(loss(attention)))(k), exact(k), **CLOSE)
    exact = torch.func.jacfwd(exact)(k)
    for first, second, third in itertools.product(modes, modes, modes):
        torch.testing.assert_close(first(second(third(loss(attention))))(k), exact, **CLOSE)


def test_forward_ad_of_autograd() -> None:
    """Dual numbers, which carry no requires_grad, and dual numbers through backward."""
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, 2, 8, seed=1), normal(2, 7, 2, 6, seed=2)
    direction = normal(*q.shape, seed=3)
    expected = torch.func.jvp(lambda q: reference.attention(q, k, v), (q,), (direction,))[1]
    with forward_ad.dual_level():
        out = attention(forward_ad.make_dual(q, direction), k, v)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected, **CLOSE)
        leaf = q.clone().requires_grad_()
        attended = attention(forward_ad.make_dual(leaf, direction), k, v).sin().sum()
        (gradient,) = torch.autograd.grad(attended, leaf, create_graph=True)
        along = forward_ad.unpack_dual(gradient).tangent
        # The gradient of a tangent, while its level lives.
        out = attention(forward_ad.make_dual(leaf, direction), k, v)
        (of_tangent,) = torch.autograd.grad(forward_ad.unpack_dual(out).tangent.sin().sum(), leaf)
    tangent = lambda q: torch.func.jvp(lambda q: reference.attention(q, k, v), (q,), (direction,))[1]  # noqa: E731
    torch.testing.assert_close(of_tangent, torch.func.grad(lambda q: tangent(q).sin().sum())(q), **CLOSE)
    exact = torch.func.grad(lambda q: reference.attention(q, k, v).sin().sum())
    torch.testing.assert_close(along, torch.func.jvp(exact, (q,), (direction,))[1], **CLOSE)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_raw_ops_have_forward_mode(requires_grad: bool) -> None:
    """Called by themselves they carry tangents as the functions do; torch.func, which cannot, hears that."""
    q, direction, stats = normal(2, 5, 4, 8), normal(2, 5, 4, 8, seed=1), normal(2, 4, 5, seed=2)
    ops, no_options = torch.ops.flash_attn_ext, (*(None,) * 13, 8**-0.5, 0.0, 0.0, False)
    pairs: list[tuple[Callable[..., object], Callable[..., object]]] = [
        (lambda x: ops.forward(x, x, x, *no_options)[0], lambda x: attention(x, x, x)),
        (lambda x: ops.merge(x, stats, 2 * x, stats + 1)[0], lambda x: merge(x, stats, 2 * x, stats + 1)[0]),
        (ops.softmax, softmax),
    ]
    for raw, function in pairs:
        tangents = []
        for called in (raw, function):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(q.clone().requires_grad_(requires_grad), direction)
                tangents.append(forward_ad.unpack_dual(called(dual)).tangent)
        assert tangents[1].any()
        assert torch.equal(*tangents)
        with pytest.raises(RuntimeError, match="does not reach through the op; call the functions"):
            torch.func.jvp(raw, (q,), (direction,))


@pytest.mark.parametrize("order", [1, 2])
def test_maps_of_directional_derivatives(order: int) -> None:
    """vmap, nested and over any dimension, of jvp and of jvp of grad."""
    q, k, v = normal(2, 3, 4, 2), normal(2, 4, 2, 2, seed=1), normal(2, 4, 2, 2, seed=2)
    directions = normal(*q.shape[:2], 3, *q.shape[2:], 2, seed=3)  # mapped: dimensions 2 and last

    def along(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        scalar = lambda q: function(q, k, v).sin().sum()  # noqa: E731
        given = (lambda q: function(q, k, v)) if order == 1 else torch.func.grad(scalar)
        return lambda direction: torch.func.jvp(given, (q,), (direction,))[1]

    expected = [[along(reference.attention)(directions[:, :, i, ..., j]) for j in range(2)] for i in range(3)]
    nested = torch.vmap(torch.vmap(along(attention), in_dims=-1), in_dims=2)(directions)
    torch.testing.assert_close(nested, torch.stack([torch.stack(row) for row in expected]), **CLOSE)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_packed_scores_that_cover_no_more_than_what_is_used(name: str) -> None:
    q, direction = normal(10, 2, 4), normal(10, 2, 4, seed=1)
    lengths = {"cu_seqlens_q": torch.tensor([0, 6, 10], dtype=torch.int32)}
    lengths |= dict.fromkeys(("seqused_q", "seqused_k"), torch.tensor([3, 2], dtype=torch.int32))
    matrix = normal(2, 2, 3, 3, seed=2) if name == "bias" else normal(2, 2, 3, 3, seed=2) < 1
    results = []
    for function in (attention_varlen, reference.attention_varlen):

        def scalar(q: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(q, q, q, **lengths, **{name: matrix}).sin().sum()

        first = torch.func.jvp(scalar, (q,), (direction,))[1]
        results.append((first, torch.func.grad(lambda q, f=scalar: torch.func.grad(f)(q).sin().sum())(q)))
    torch.testing.assert_close(*results, **CLOSE)


def test_maps_over_lengths_are_refused_where_they_cannot_be_read() -> None:
    q, direction = normal(10, 2, 4), normal(10, 2, 4, seed=1)
    lengths = torch.tensor([[0, 4, 10], [0, 7, 10]], dtype=torch.int32)

    def scalar(q: Tensor, starts: Tensor) -> Tensor:
        return attention_varlen(q, q, q, starts).sin().sum()

    once = torch.vmap(torch.func.grad(scalar), (None, 0))(q, lengths)
    assert torch.equal(once, torch.stack([torch.func.grad(scalar)(q, starts) for starts in lengths]))
    along: list[Callable[[Tensor], Tensor]] = [
        lambda starts: torch.func.jvp(lambda q: scalar(q, starts), (q,), (direction,))[1],
        lambda starts: torch.func.grad(lambda q: torch.func.grad(scalar)(q, starts).sin().sum())(q),
    ]
    for function in along:
        assert function(lengths[0]).isfinite().all()
        with pytest.raises(InputError, match="cu_seqlens_q and cu_seqlens_k must be the same for all members"):
            torch.vmap(function)(lengths)


def test_merge_and_softmax() -> None:
    out_a, out_b = (normal(2, 3, 2, 4, seed=i).requires_grad_() for i in range(2))
    lse_a, lse_b = (normal(2, 2, 3, seed=i).requires_grad_() for i in (2, 3))
    modes = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert torch.autograd.gradcheck(merge, (out_a, lse_a, out_b, lse_b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merge, (out_a, lse_a, out_b, lse_b), **modes, fast_mode=True)
    x = normal(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(softmax, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(softmax, x, **modes)
    exact = torch.func.jacfwd(torch.func.jacfwd(lambda x: torch.softmax(x, -1)))(x.detach())
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(softmax))(x.detach()), exact, **CLOSE)


def test_raw_op_has_second_derivatives() -> None:
    q, k, v = (normal(2, 4, 2, 3, seed=i).requires_grad_() for i in range(3))

    def raw(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.flash_attn_ext.forward(q, k, v, *[None] * 12, 0, 0.3, 0.0, 0.0, False)

    assert torch.autograd.gradgradcheck(raw, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """jvp and double backward compute in float32: their errors are those of the dtype's inputs and results."""
    q, k, v, direction = (normal(1, 40, 2, 16, seed=i).to(dtype) for i in range(4))
    exact = torch.func.jvp(lambda q: reference.attention(q, k, v), (q.double(),), (direction.double(),))[1]
    _, own = torch.func.jvp(lambda q: attention(q, k, v), (q,), (direction,))
    assert own.dtype == dtype
    low = torch.func.jvp(lambda q: reference.attention(q, k, v, dtype=dtype), (q,), (direction,))[1]
    assert (own.double() - exact).abs().max() <= reference.error_bound(exact, low, dtype, 3.0)


def test_second_derivatives_hold_no_matrix_of_scores() -> None:
    """Peak of what torch allocates: below one S x S matrix, whatever the modes."""
    seqlen = 2048
    q, k, v = (normal(1, seqlen, 1, 4, seed=i).float().requires_grad_() for i in range(3))
    matrix = seqlen * seqlen * 4

    def double_backward() -> None:
        grads = torch.autograd.grad(attention(q, k, v).sin().sum(), (q, k, v), create_graph=True)
        torch.autograd.grad(sum(g.sin().sum() for g in grads), (q, k, v))

    def forward_mode() -> None:
        torch.func.jvp(lambda q: attention(q, k, v), (q.detach(),), (q.detach(),))

    def gradient_of_a_tangent() -> None:
        with forward_ad.dual_level():
            out = attention(forward_ad.make_dual(q, q.detach()), k, v)
            forward_ad.unpack_dual(out).tangent.sum().backward()

    for call in (double_backward, forward_mode, gradient_of_a_tangent):
        assert peak_bytes(call) < matrix, call.__name__


def peak_bytes(call: Callable[[], None]) -> int:
    """The most that tensors made in `call` held at once, by the profiler's record of the allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=False) as profile:
        call()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "dual numbers"])
def test_inside_compiled_code(name: str) -> None:
    """torch.compile leaves a function that differentiates to Python, and right; it says so where it may not."""
    x, direction = normal(1, 4, 2, 3), normal(1, 4, 2, 3, seed=1)

    def scalar(x: Tensor) -> Tensor:
        return attention(x.sin(), x, x, causal=True).sin().sum()

    def dual(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, direction))).tangent

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "grad": torch.func.grad(scalar),
        "jvp": lambda x: torch.func.jvp(scalar, (x,), (direction,))[1],
        "hessian": torch.func.hessian(scalar),
    }
    torch._dynamo.reset()
    compiled = torch.compile(scalar if name == "dual numbers" else functions[name], backend="aot_eager")
    if name == "dual numbers":
        compiled(x)  # what was compiled before must not be what runs
        torch.testing.assert_close(dual(x), functions["jvp"](x), **CLOSE)
    else:
        torch.testing.assert_close(compiled(x), functions[name](x), **CLOSE)
        torch._dynamo.reset()
        whole = torch.compile(functions[name], backend="aot_eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            whole(x)
    torch._dynamo.reset()
