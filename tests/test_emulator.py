"""What only the emulator shows of the GPU kernels: races, and what tf32 does to products."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from cases import Case, Inputs, Result, check
from conftest import EMULATED, EMULATOR, EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from test_hypothesis import problems

from flash_attn_ext import _C, explain

pytestmark = pytest.mark.skipif(not EMULATED, reason="built without FAE_EMULATOR=1")

CASES = (
    Case(seqlen_q=140, seqlen_k=200, dtype=torch.bfloat16),
    Case(seqlen_q=140, seqlen_k=200, window_right=0, head_dim=128, batch=1, dtype=torch.float16),
    Case(bias="1hqk", sinks=True, dropout_p=0.3, window_left=20, dtype=torch.bfloat16),
    Case(seqlen_q=260, seqlen_k=264, bias="11qk", window_right=0, head_dim=64, dtype=torch.bfloat16),
    Case(lengths_q=(100, 0, 33), lengths_k=(70, 12, 233), head_dim=96, dtype=torch.float16),
    Case(head_dim=200, batch=1, heads=2, dtype=torch.bfloat16),
    Case(lengths_q=(100, 0, 33, 270), lengths_k=(70, 12, 233, 270), head_dim=160, window_right=0, dtype=torch.bfloat16),
    Case(head_dim=400, batch=1, heads=2),
    Case(lengths_q=(300, 70, 390), lengths_k=(260, 300, 270), head_dim=64, window_right=0, dtype=torch.bfloat16),
    # Warps that wait for others by looking at memory again and again.
    Case(seqlen_q=64, seqlen_k=192, window_right=0, head_dim=64, batch=1, dtype=torch.bfloat16),
)


@pytest.fixture(params=list(EMULATED) or ["none"])
def backend(request: pytest.FixtureRequest):
    _C.set_backends(EMULATED[request.param])
    yield request.param
    _C.set_backends([])


def kernels_that_run(case: Case, names: set[str]) -> set[str]:
    """Those of `names` that a forward and backward on the emulated Hopper take."""

    def count(name: str) -> int:
        function = ctypes.CDLL(str(EMULATOR)).fae_count_grids
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
        return function(name.encode())

    before = {name: count(name) for name in names}
    _C.set_backends(EMULATED["sm90_emulated"])
    try:
        case.run_ours(case.make())
    finally:
        _C.set_backends([])
    return {name for name, runs in before.items() if count(name) > runs}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_of_warps(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier that is missing shows when the warps of a block run in another order."""
    inputs = case.make()
    forward = case.run_ours(inputs)
    monkeypatch.setenv("FAE_EMULATOR_ORDER", "backward")
    backward = case.run_ours(inputs)
    for name, expected in forward.items():
        assert torch.equal(backward[name], expected), name


# Head dim 128 without causal order or window; four or eight key blocks.
GOES_ROUND = Case(seqlen_q=330, seqlen_k=500, head_dim=128, heads=1, heads_kv=1, batch=1, dtype=torch.bfloat16)


def run_on_hopper(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    multiprocessors: int = 132,
    free: int = 9,
    slow: int = 0,
    run: Callable[[Inputs], Result] | None = None,
) -> Result:
    """On a card with so many multiprocessors, of which a backward gets `free` at a time, and which are slow in turn."""
    monkeypatch.setenv("FAE_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("FAE_EMULATOR_FREE", str(free))
    monkeypatch.setenv("FAE_EMULATOR_SLOW", str(slow))
    _C.set_backends(EMULATED["sm90_emulated"])
    try:
        check(case)
        return (run or case.run_ours)(case.make())
    finally:
        _C.set_backends([])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 2, "heads": 2, "seqlen_q": 320},  # statistics lie in dQ's memory
        {"seqlen_q": 800, "seqlen_k": 1000},
        {"seqlen_q": 700, "seqlen_k": 1000, "window_right": 0},  # these follow each other
        {"seqlen_q": 300},  # fewer query blocks than key blocks
        {"heads": 4, "heads_kv": 2, "seqlen_q": 530},
        {"heads": 4, "heads_kv": 2},  # one task for all heads that share keys
        {"lengths_q": (330, 0, 70, 520), "lengths_k": (500, 100, 0, 390)},
        {"lengths_q": (330, 400, 360), "lengths_k": (500, 400, 510), "heads": 2},
        {"batch": 2, "used_q": (300, 325), "used_k": (400, 70)},
        {"bias": "bhqk", "softcap": 3.0},
        {"bias": "bhqk"},
        {"dropout_p": 0.3, "dtype": torch.float16},
    ],
    ids=str,
)
def test_key_blocks_that_go_round(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for each other, but have the same results where not all run at the same time."""
    case = GOES_ROUND.but(**changes)
    expected = run_on_hopper(case, monkeypatch)
    for free, slow in ((1, 0), (3, 0), (3, 400), (4, 5), (6, 40)):
        for name, result in run_on_hopper(case, monkeypatch, free=free, slow=slow).items():
            assert torch.equal(result, expected[name]), (free, slow, name)


def test_key_blocks_go_round_in_packs_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (500, 34, 1000, 400)
    case = GOES_ROUND.but(lengths_q=lengths, lengths_k=lengths, heads=2, heads_kv=2)
    packed, alone = run_on_hopper(case, monkeypatch), run_on_hopper(case, monkeypatch, run=case.run_alone)
    for name, expected in packed.items():
        assert torch.equal(alone[name], expected), name


@st.composite
def rounds(draw: DrawFn) -> Case:
    """Of any options, but as long and of such head dims that key blocks go round, of the first sequence in any case."""
    case = draw(problems().filter(lambda case: case.batch > 0 and case.heads > 0))
    queries, keys = st.integers(320, 420), st.integers(385, 512)
    changes: dict[str, object] = {
        "head_dim": draw(st.integers(65, 128)),
        "head_dim_v": None,
        "seqlen_q": draw(queries),
        "seqlen_k": draw(keys),
        "dtype": draw(st.sampled_from((torch.bfloat16, torch.float16))),
        **dict.fromkeys(("window_left", "window_right", "used_q", "used_k")),
    }
    if case.lengths_q:
        changes["lengths_q"] = (draw(queries), *case.lengths_q[1:])
        changes["lengths_k"] = (draw(keys), *case.lengths_k[1:])
    return case.but(**changes)


@settings(max_examples=max(EXAMPLES // 200, 1))
@given(case=rounds(), free=st.integers(1, 9), slow=st.sampled_from((0, 1, 5, 20, 80, 400)))
def test_drawn_rounds(case: Case, free: int, slow: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = run_on_hopper(case, monkeypatch)
        result = run_on_hopper(case, monkeypatch, free=free, slow=slow)
    for name in expected:
        assert torch.equal(result[name], expected[name]), name


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, True), ({"seqlen_k": 520}, False), ({"window_left": 500}, False)], ids=str
)
def test_whether_key_blocks_go_round(
    changes: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on small cards, where sums have another order. Otherwise the test above would show nothing."""
    case = GOES_ROUND.but(heads=4, heads_kv=4, dtype=torch.float16, **changes)
    large, small = (run_on_hopper(case, monkeypatch, multiprocessors) for multiprocessors in (132, 3))
    assert all(torch.equal(large[name], small[name]) for name in large) == (not expected)


def test_it_is_the_kernels_that_run(backend: str) -> None:
    """Not the CPU's: they add up in another order."""
    q, k, v = (torch.randn(1, 100, 2, 64) for _ in range(3))
    options = [None] * 13
    emulated = torch.ops.flash_attn_ext.forward(q, k, v, *options, 0.125, 0.0, 0.0, False)[0]
    _C.set_backends(["cpu"])
    assert not torch.equal(torch.ops.flash_attn_ext.forward(q, k, v, *options, 0.125, 0.0, 0.0, False)[0], emulated)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "sm90 bias gradient"),
        ({"window_right": 0, "sinks": True, "heads_kv": 1, "head_dim": 128}, "sm90 bias gradient"),
        ({"bias": "b1qk"}, "sm90 bias gradient"),
        ({"batch": 4, "bias": "11qk"}, "sm90 bias gradient sum"),  # few tiles, whose visits are shared out
        ({"seqlen_k": 70}, "sm90 bias gradient"),  # rows do not begin at multiples of 16 bytes: of copies
        # What has no kernel of its own here.
        ({"bias": "1h1k"}, "sm80 bias gradient"),
        ({"softcap": 3.0}, "sm80 bias gradient"),
        ({"used_k": (70, 41)}, "sm80 bias gradient"),
        ({"dtype": torch.float32}, "sm80 bias gradient"),
    ],
    ids=str,
)
def test_kernel_of_the_gradient_of_a_shared_bias(changes: dict[str, object], kernel: str) -> None:
    case = Case(seqlen_q=40, seqlen_k=72, head_dim=64, bias="1hqk", dtype=torch.bfloat16).but(**changes)
    kernels = {f"sm{level} bias gradient" for level in (80, 90)}
    assert kernels_that_run(case, kernels | {kernel}) == {kernel, kernel.removesuffix(" sum")}


@pytest.mark.parametrize(
    ("changes", "copied"),
    [
        ({}, True),
        ({"seqlen_k": 80}, False),  # rows begin at multiples of 16 bytes
        ({"bias": "", "mask": "bhqk"}, True),
        ({"softcap": 3.0}, False),  # no kernel that the accelerator loads it for
        ({"head_dim": 136}, False),
        ({"head_dim": 136, "bias": "", "mask": "bhqk"}, False),
        ({"head_dim": 136, "bias": "1hqk"}, True),  # the gradient of a bias that batches share
    ],
    ids=str,
)
def test_rows_are_copied_where_a_kernel_wants_them(changes: dict[str, object], copied: bool) -> None:
    case = Case(seqlen_q=40, seqlen_k=70, head_dim=64, bias="bhqk", dtype=torch.bfloat16).but(**changes)
    assert kernels_that_run(case, {"matrix copy"}) == ({"matrix copy"} if copied else set())


@pytest.mark.parametrize("head_dim", [36, 100, 250])
def test_hopper_takes_rows_that_are_not_whole_vectors(head_dim: int) -> None:
    case = Case(head_dim=head_dim, window_right=0, dtype=torch.float16)
    kernels = {f"sm{level} {which}" for level in (80, 90) for which in ("forward", "backward", "dQ")}
    assert kernels_that_run(case, kernels) == {"sm90 forward", "sm90 dQ" if head_dim > 128 else "sm90 backward"}


def test_kernels_of_large_head_dims() -> None:
    case = Case(head_dim=192, dtype=torch.bfloat16)
    separate, shared = {"sm90 dQ", "sm90 dK, dV"}, {"sm90 backward"}
    assert kernels_that_run(case, separate | shared) == separate
    assert kernels_that_run(case.but(softcap=3.0), separate | shared) == shared


def test_tf32_is_taken_where_it_is_allowed(backend: str) -> None:
    """One tf32 product has 11 bits, three have those of float32."""
    q, k, v = (torch.randn(1, 100, 2, 64) for _ in range(3))
    options = [None] * 13

    def error(allow_tf32: bool) -> float:
        out, _ = torch.ops.flash_attn_ext.forward(q, k, v, *options, 0.125, 0.0, 0.0, allow_tf32)
        exact = torch.softmax(
            0.125 * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()), -1
        ) @ v.double().transpose(1, 2)
        return (out - exact.transpose(1, 2)).abs().max().item()

    assert error(False) < 1e-6
    assert 1e-5 < error(True) < 2e-3


@settings(max_examples=max(EXAMPLES // 20, 1))
@given(
    case=problems().filter(lambda case: case.dtype != torch.float64), backend=st.sampled_from([*EMULATED] or ["none"])
)
def test_drawn_problem(case: Case, backend: str) -> None:
    _C.set_backends(EMULATED[backend])
    try:
        check(case)
    finally:
        _C.set_backends([])


def test_hopper_primitives() -> None:
    """Tensor copies, barriers and products of a warpgroup put every number where the loops of the check expect it."""
    assert ctypes.CDLL(str(EMULATOR)).fae_check_sm90_primitives() == 0


@pytest.mark.parametrize(("heads", "instruction"), [(1046531, "wgmma"), (1046532, "mma.sync")])
def test_more_blocks_of_keys_than_hopper_numbers_go_to_the_other_kernels(heads: int, instruction: str) -> None:
    """1026 numbers for each head of 65536 keys, and fewer than 2^30 of them; explain names each direction's kernel."""
    q, k = (torch.empty(1, rows, heads, 64, dtype=torch.bfloat16, device="meta") for rows in (8, 65536))
    _C.set_backends(EMULATED["sm90_emulated"])
    try:
        found = explain(q, k, k)
    finally:
        _C.set_backends([])
    assert found.backend == "sm90_emulated"
    assert f"on {instruction}," in str(found.backward_kernel)
    reasons = ("its backward takes fewer than 2^30 blocks of 64 keys",)
    assert found.declined.get("sm90_emulated") == (None if instruction == "wgmma" else reasons)


@pytest.mark.parametrize(("rows", "reasons"), [(2**25 - 64, None), (2**25, ("2^31 groups of 16 query rows",))])
def test_more_rows_than_hopper_numbers_go_to_the_other_kernels(rows: int, reasons: tuple[str, ...] | None) -> None:
    """rows / 16 + 2 numbers for each of 1024 heads, and fewer than 2^31 of them."""
    q, k = (torch.empty(1, n, 1024, 64, dtype=torch.bfloat16, device="meta") for n in (rows, 8))
    _C.set_backends(EMULATED["sm90_emulated"])
    try:
        found = explain(q, k, k)
    finally:
        _C.set_backends([])
    declined = reasons and tuple(f"its backward takes fewer than {reason}" for reason in reasons)
    assert found.declined.get("sm90_emulated") == declined
