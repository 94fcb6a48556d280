"""What only a GPU can show: streams, graphs, addresses beyond 32 bits, the same bits under load, the CPU's dropout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from cases import Case, check
from hypothesis import given
from test_hypothesis import problems

import flash_attn_ext
from flash_attn_ext import attention
from flash_attn_ext.demo.memory import PeakMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CASES = (
    Case(seqlen_q=700, seqlen_k=900, head_dim=64, dtype=torch.bfloat16),
    Case(seqlen_q=700, seqlen_k=700, head_dim=128, window_right=0, dtype=torch.float16, heads=8, heads_kv=2),
    Case(seqlen_q=300, seqlen_k=500, head_dim=64, bias="1hqk", sinks=True, dropout_p=0.2, dtype=torch.bfloat16),
    Case(lengths_q=(500, 0, 33, 257), lengths_k=(700, 12, 333, 257), head_dim=96, dtype=torch.bfloat16, window_right=0),
    Case(seqlen_q=2000, seqlen_k=2000, head_dim=64, bias="1hqk", window_right=0, dtype=torch.bfloat16),
    Case(batch=4, seqlen_q=300, seqlen_k=512, head_dim=128, bias="11qk", dtype=torch.float16),
    Case(seqlen_q=1000, seqlen_k=1000, head_dim=128, heads=8, heads_kv=2, dtype=torch.bfloat16),
    Case(seqlen_q=200, seqlen_k=300, head_dim=256, dtype=torch.float16),
    Case(seqlen_q=200, seqlen_k=300, head_dim=64, dtype=torch.float32),
)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def random_qkv(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q, k, v, causal=True)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, run: Attention = causal_attention
) -> tuple[torch.Tensor, ...]:
    out = run(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("load", [False, True], ids=["alone", "under load"])
def test_the_same_bits_in_1000_runs(case: Case, load: bool) -> None:
    inputs = case.make("cuda")
    first = case.run_ours(inputs)
    busy, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for run in range(1000):
        if load and run % 10 == 0:
            with torch.cuda.stream(other):
                busy = torch.tanh(busy @ busy)
        for name, got in case.run_ours(inputs).items():
            assert torch.equal(got, first[name]), f"{name} in run {run}"


@given(case=problems().filter(lambda case: case.dtype != torch.float64))
def test_drawn_problem(case: Case) -> None:
    """FAE_TEST_EXAMPLES in several processes draws more of them, others in each."""
    check(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_what_the_cpu_drops(dtype: torch.dtype) -> None:
    """With v = the identity, out shows every probability: zeros are what was dropped."""
    rows, keys = 200, 256
    rng_state = torch.tensor([1234567890123, 42])

    def dropped(device: str) -> torch.Tensor:
        q = torch.zeros(2, rows, 3, 16, device=device, dtype=dtype)
        k = torch.zeros(2, keys, 3, 16, device=device, dtype=dtype)
        v = torch.eye(keys, device=device, dtype=dtype)[None, :, None].expand(2, -1, 3, -1)
        options = [None] * 8
        out, _ = torch.ops.flash_attn_ext.forward(
            q, k, v, *options, rng_state.to(device), *[None] * 4, 0.25, 0.0, 0.3, False
        )
        return (out == 0).cpu()

    assert torch.equal(dropped("cuda"), dropped("cpu"))
    assert 0.25 < dropped("cuda").double().mean() < 0.35


def test_current_stream() -> None:
    """Inputs that another stream is still computing are waited for by that stream alone."""
    q, k, v = (t.detach() for t in random_qkv(2, 1000, 8, 64))
    expected = attention(q, k, v)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = attention(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


def captured_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(q, k, v, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(q, k, v, dout)
    return graph, captured


@pytest.mark.parametrize("head_dim", [64, 256])  # one kernel for all gradients, and kernels that overlap
def test_cuda_graph_captures_forward_and_backward(head_dim: int) -> None:
    q, k, v = random_qkv(2, 300, 4, head_dim)
    dout = torch.randn_like(q)
    graph, captured = captured_step(q, k, v, dout)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for t in (q, k, v, dout):
                t.copy_(torch.randn_like(t))
        graph.replay()
        for got, expected in zip(captured, step(q, k, v, dout), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.slow  # to be run alone: others on the machine would be measured, too
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_host_keeps_up_with_a_training_step(head_dim: int) -> None:
    """Calls through autograd take hardly longer than their kernels do, which a graph runs without the host."""
    q, k, v = random_qkv(32, 512, 2048 // head_dim, head_dim)
    dout = torch.randn_like(q)
    # Of other tensors: a leaf remembers the stream of its first step, and gradients would wait for that one every time.
    graph, _ = captured_step(*random_qkv(*q.shape), dout)

    def milliseconds(run: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(100):
            run()
        torch.cuda.synchronize()  # what the host is ahead does not count
        begin.record()
        for _ in range(200):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 200

    rounds = [(milliseconds(graph.replay), milliseconds(lambda: step(q, k, v, dout))) for _ in range(5)]
    kernels, calls = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"D {head_dim}: a step takes {calls:.3f} ms, its kernels {kernels:.3f}")
    assert calls < 1.05 * kernels


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"dropout_p": 0.2}, {"alibi_slopes": True}, {"bias": True}])
def test_the_same_bits_where_few_multiprocessors_are_free(options: dict[str, object]) -> None:
    """On Hopper, key blocks that go round wait for each other: sixteen, of which twelve at most can begin."""

    def backward(rows: int, keys: int, heads: int, **options: object) -> Callable[[], tuple[torch.Tensor, ...]]:
        x = [torch.randn(1, n, heads, 128, device="cuda", dtype=torch.bfloat16) for n in (rows, keys, keys, rows)]
        q, k, v = (t.requires_grad_() for t in x[:3])
        if "bias" in options:
            options["bias"] = torch.randn(1, heads, rows, keys, device="cuda", dtype=q.dtype)
        if "alibi_slopes" in options:
            options["alibi_slopes"] = torch.rand(heads, device="cuda")
        out = attention(q, k, v, **options)
        return lambda: torch.autograd.grad(out, (q, k, v), x[3], retain_graph=True)

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    occupy = backward(60_000, 128, max(multiprocessors - 12, 1))  # one block of keys for each head: milliseconds
    gradients, other = backward(2048, 2048, 4, **options), torch.cuda.Stream()
    first = gradients()
    torch.cuda.synchronize()
    for run in range(20):
        with torch.cuda.stream(other):
            occupy()
        for again in range(10):  # some of them meanwhile
            assert all(map(torch.equal, gradients(), first)), (run, again)
        torch.cuda.synchronize()


@pytest.mark.parametrize("heads_kv", [2, 4])
def test_key_blocks_go_round_in_packs_as_alone(heads_kv: int) -> None:
    """Those of some lengths, on large cards."""
    lengths = (1000, 34, 2048, 600, 4000)
    case = Case(lengths_q=lengths, lengths_k=lengths, heads=4, heads_kv=heads_kv, head_dim=128, dtype=torch.bfloat16)
    inputs = case.make("cuda")
    packed, alone = case.run_ours(inputs), case.run_alone(inputs)
    for name, expected in packed.items():
        assert torch.equal(alone[name], expected), name


@pytest.mark.slow
def test_training_has_the_same_bits_twice() -> None:
    rich = pytest.importorskip("rich.progress", reason="the demo's packages are not installed")
    from flash_attn_ext.demo import train as demo

    settings = demo.Settings(steps=200, width=384, heads=6, layers=6)
    text = demo.Text(settings.vocabulary)

    def trained() -> tuple[list[float], list[torch.Tensor]]:
        with torch.autocast("cuda", torch.bfloat16), rich.Progress(disable=True) as progress:
            run = demo.train(causal_attention, text, settings, torch.device("cuda"), progress, "ours")
        return run.losses, [p.detach() for p in run.model.parameters()]

    (losses, parameters), (losses_again, parameters_again) = trained(), trained()
    assert losses == losses_again
    assert all(map(torch.equal, parameters, parameters_again))
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("rows", [64, 1000, 4096])
def test_overlapping_kernels_begin_after_and_end_before_others(rows: int) -> None:
    """What is written right before a call is what it reads; what is written right after it does not disturb it."""
    inputs = [t.detach() for t in random_qkv(1, rows, 4, 256)]
    dout = torch.randn_like(inputs[0])
    expected = step(*(t.clone().requires_grad_() for t in inputs), dout)
    q, k, v = (torch.zeros_like(t).requires_grad_() for t in inputs)
    for _ in range(50):
        with torch.no_grad():
            for t, value in zip((q, k, v), inputs, strict=True):
                t.copy_(value)
        results = step(q, k, v, dout)
        with torch.no_grad():
            for t in (q, k, v):
                t.fill_(math.nan)
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [1024, 4096])
def test_memory_is_sums_of_dq_and_two_floats_a_row(seqlen: int, head_dim: int) -> None:
    q, k, v = random_qkv(1, seqlen, 16, head_dim)
    dout = torch.randn_like(q)
    step(q, k, v, dout)
    with PeakMemory("cuda") as peak:
        results = step(q, k, v, dout)
    rows = seqlen * 16
    counters = rows / 4  # of the visits to blocks of 16 rows or more, by 4 bytes, and what the allocator rounds up
    assert peak.bytes - sum(x.nbytes for x in results) <= rows * (4 * head_dim + 8) + counters


def test_compiled_with_dynamic_shapes() -> None:
    compiled = torch.compile(causal_attention, fullgraph=True, dynamic=True)
    for rows in (100, 177, 256):
        q, k, v = random_qkv(1, rows, 4, 64)
        dout = torch.randn_like(q)
        for got, expected in zip(step(q, k, v, dout, compiled), step(q, k, v, dout), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_strides_beyond_32_bits() -> None:
    """Heads of a batch that lie more than 2^31 elements apart."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    storage = torch.empty(5 << 30, device="cuda", dtype=torch.bfloat16)
    shape, stride = (2, 150, 2, 64), ((5 << 30) - (1 << 22), 128, 64, 1)
    small = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    large = []
    for i, t in enumerate(small):
        view = storage.as_strided(shape, stride, i << 20)
        view.copy_(t)
        large.append(view.requires_grad_())
    leaves = [t.requires_grad_() for t in small]
    dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    for got, expected in zip(step(*large, dout), step(*leaves, dout), strict=True):
        assert torch.equal(got, expected)


def test_garbage_lengths_reach_nothing_outside() -> None:
    """cu_seqlens and seqused of any content neither crash nor hang; compute-sanitizer shows that nothing leaks out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(500, 4, 64)
    for _ in range(30):
        starts = [torch.randint(-600, 1200, (9,), generator=generator, dtype=torch.int32).cuda() for _ in range(2)]
        used = [torch.randint(-50, 300, (8,), generator=generator, dtype=torch.int32).cuda() for _ in range(2)]
        out = flash_attn_ext.attention_varlen(q, k, v, *starts, seqused_q=used[0], seqused_k=used[1], causal=True)
        torch.autograd.grad(out.sum(), (q, k, v))
    torch.cuda.synchronize()
    check(Case(dtype=torch.bfloat16), "cuda")


def test_float32_has_the_accuracy_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless torch is told that tf32 will do."""
    q, k, v = (t.detach() for t in random_qkv(2, 400, 4, 64, dtype=torch.float32))

    def error() -> float:
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(64)
        exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
        return (attention(q, k, v) - exact).abs().max().item()

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert error() < 2e-6
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert 1e-5 < error() < 5e-3
