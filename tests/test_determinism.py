"""Bits do not depend on the run, on the number of threads, or on what else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, Inputs, Result

CASES = (
    Case(batch=1, heads=1, heads_kv=1, seqlen_q=700, seqlen_k=2500, head_dim=16),
    Case(seqlen_q=130, seqlen_k=300, heads=6, heads_kv=2, window_right=0, bias="1h1k", sinks=True),
    Case(seqlen_q=1, seqlen_k=3000, heads=4, heads_kv=2, batch=1),
    Case(seqlen_q=96, seqlen_k=96, bias="11qk", softcap=5.0, dropout_p=0.2, alibi="h", window_left=40),
    Case(batch=4, seqlen_q=330, seqlen_k=264, heads=4, heads_kv=2, head_dim=64, bias="11qk", window_right=0),
    Case(lengths_q=(100, 0, 33), lengths_k=(70, 12, 333), heads=2, heads_kv=1, bias="b11k", tail=3),
)


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_equal(got: Result, expected: Result) -> None:
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


@pytest.mark.large
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads(device: str, dtype: torch.dtype, case: Case, thread_count: None) -> None:
    if device == "cuda":
        pytest.skip("threads belong to the CPU")
    inputs = case.but(dtype=dtype).make()
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(case.but(dtype=dtype).run_ours(inputs))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_and_rounds(dtype: torch.dtype, thread_count: None) -> None:
    """Partial sums of dQ come in rounds of as many (sequence, KV head) as fit into memory, of which each thread brings
    some: with these, two rounds for one thread, of which the first ends within a sequence, and one for eight."""
    lengths_q, lengths_k = (1500, 1, 1500, 0, 33, 1500, 2), (140, 1, 129, 70, 0, 140, 130)
    case = Case(lengths_q=lengths_q, lengths_k=lengths_k, heads=8, heads_kv=2, head_dim=512, dtype=dtype)
    inputs = case.make()
    torch.set_num_threads(1)
    expected = case.run_ours(inputs)
    torch.set_num_threads(8)
    assert_equal(case.run_ours(inputs), expected)


@pytest.mark.large
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_repeated_runs(device: str, dtype: torch.dtype, case: Case) -> None:
    inputs = case.but(dtype=dtype).make(device)
    expected = case.but(dtype=dtype).run_ours(inputs)
    for _ in range(10):
        assert_equal(case.but(dtype=dtype).run_ours(inputs), expected)


def names_that_keep_their_bits(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Results of a sequence that do not depend on what else is in the batch.

    On the CPU, partial sums of gradients follow the shape of the whole call.
    """
    cpu = request.node.callspec.id.startswith("cpu")
    return ("out", "lse") if cpu else ("out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=3, seqlen_q=70, seqlen_k=150, window_right=0, softcap=3.0, bias="bhqk", sinks=True),
        Case(batch=3, seqlen_q=1, seqlen_k=1500, head_dim=64),
        Case(batch=3, seqlen_q=300, seqlen_k=300, head_dim=64, alibi="bh", mask="b11k"),
        Case(batch=3, seqlen_q=520, seqlen_k=300, heads=4, heads_kv=2, head_dim=128, window_right=0),
    ],
    ids=str,
)
def test_batch_invariance(device: str, dtype: torch.dtype, case: Case, request: pytest.FixtureRequest) -> None:
    """A sequence has the same bits alone as in a batch (dropout numbers the batch, and is left out)."""
    case = case.but(dtype=dtype)
    inputs = case.make(device)
    together = case.run_ours(inputs)
    shared = ("sinks",)
    for b in range(case.batch):
        one: Inputs = {
            name: t if t is None or name in shared else t[b : b + 1].contiguous() for name, t in inputs.items()
        }
        alone = case.but(batch=1).run_ours(one)
        for name in names_that_keep_their_bits(request):
            assert torch.equal(together[name][b : b + 1], alone[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_histories(dtype: torch.dtype) -> None:
    """On the CPU, a token against its history has the same bits alone as packed between others, and as unpacked."""
    lengths = (1, 700, 256, 0, 3000, 257)
    case = Case(lengths_q=(1,) * len(lengths), lengths_k=lengths, head_dim=64, window_right=0, dtype=dtype)
    inputs = case.make()
    packed = case.run_ours(inputs)
    start = 0
    for b, length in enumerate(lengths):
        one: Inputs = dict.fromkeys(inputs)
        one |= {name: inputs[name][b : b + 1].unsqueeze(0) for name in ("q", "dout")}
        one |= {name: inputs[name][start : start + length].unsqueeze(0) for name in ("k", "v")}
        one["dlse"] = inputs["dlse"][:, b : b + 1].unsqueeze(0)
        alone = case.but(lengths_q=None, lengths_k=None, batch=1, seqlen_q=1, seqlen_k=length).run_ours(one)
        assert torch.equal(packed["out"][b], alone["out"][0, 0]), length
        assert torch.equal(packed["lse"][:, b], alone["lse"][0, :, 0]), length
        start += length


UNEQUAL = (34, 520, 190)
EQUAL = (150, 150, 150)  # which GPUs take in another order


@pytest.mark.parametrize("window_right", [None, 0])
@pytest.mark.parametrize(
    ("head_dim", "lengths", "term"),
    [
        (64, UNEQUAL, {}),
        (128, UNEQUAL, {}),
        (128, (34, 528, 190), {}),  # 528: alone, dQ's memory is used for something else before
        (64, EQUAL, {}),
        (128, EQUAL, {}),
        (128, UNEQUAL, {"softcap": 3.0}),
        (64, UNEQUAL, {"bias": "11qk", "bias_values": "jumps"}),
        (128, UNEQUAL, {"mask": "11qk"}),
    ],
    ids=str,
)
def test_packing_invariance(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    lengths: tuple[int, ...],
    term: dict[str, object],
    window_right: int | None,
    request: pytest.FixtureRequest,
) -> None:
    """A sequence has the same bits alone as packed between others, whose scores come nearer to a softcap, too."""
    case = Case(
        lengths_q=lengths,
        lengths_k=lengths,
        heads=4,
        heads_kv=2,
        head_dim=head_dim,
        window_right=window_right,
        bias_grad=False,
        dtype=dtype,
        **term,
    )
    inputs = case.make(device)
    packed, alone = case.run_ours(inputs), case.run_alone(inputs)
    for name in names_that_keep_their_bits(request):
        assert torch.equal(packed[name], alone[name]), name
