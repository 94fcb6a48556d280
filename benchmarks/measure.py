"""How it is measured: time in interleaved rounds, error against float64, peak memory in a fresh process."""

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from candidates import CANDIDATES, OURS, Candidate, Inputs, Prepared, Softmax, flash_options, make_inputs
from suites import Case, Suite
from torch import Tensor

from flash_attn_ext import reference
from flash_attn_ext.demo.memory import PeakMemory

Context = Callable[[], AbstractContextManager[object]]

GEMM_SIZE = 1024
MIN_ROUNDS = 3
BATCH_SECONDS = 0.03  # a sample is the mean of as many calls as take about this long
SLOW_SECONDS = 20.0  # plain softmax attention is left out where its matrix products alone would take longer in a call


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Times one call; ``sample()`` adds a measurement.

    Another candidate had the caches before, so a short call is made once beforehand; a long one warms itself.
    """

    def __init__(self, call: Callable[[], object], device: str, context: Context = nullcontext):
        self._call, self._context, self._device = call, context, device
        self.seconds: list[float] = []
        with context():
            self._time(1)  # builds what is built once: graphs, kernels, thread pools
            self._calls = max(1, min(1000, round(BATCH_SECONDS / self._time(1))))

    def _time(self, calls: int) -> float:
        synchronize(self._device)
        start = time.perf_counter()
        for _ in range(calls):
            self._call()
        synchronize(self._device)
        return (time.perf_counter() - start) / calls

    def sample(self) -> None:
        with self._context():
            if self._calls > 1:
                self._call()
            self.seconds.append(self._time(self._calls))

    def quartiles_ms(self) -> list[float]:
        """First quartile, median, third quartile."""
        return [significant(q * 1e3, 4) for q in statistics.quantiles(self.seconds, n=4, method="inclusive")]


def significant(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")


def gemm(dtype: str, device: str) -> Callable[[], Tensor]:
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(getattr(torch, dtype))
    b = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(getattr(torch, dtype))
    return lambda: a @ b


def gemm_rate(watch: Stopwatch) -> float:
    """FLOP/s of the products that ``gemm`` makes."""
    return 2 * GEMM_SIZE**3 / statistics.median(watch.seconds)


def expected_results(case: Case, inputs: Inputs) -> list[Tensor]:
    """Output and gradients in float64 for the first KV head and its query heads, where errors are measured."""
    group = slice(case.heads // case.heads_kv)
    q, k, v = (x[:1].double().requires_grad_() for x in (inputs.q[:, :, group], inputs.k[:, :, :1], inputs.v[:, :, :1]))
    out = reference.attention(q, k, v, **flash_options(case))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout[:1, :, group].double())]


def errors(candidate: Candidate, prepared: Prepared, expected: list[Tensor]) -> dict[str, float]:
    """Largest absolute difference from float64, per tensor."""
    with candidate.context():
        actual = (prepared.forward(), *prepared.backward())
    named = zip(("out", "dq", "dk", "dv"), actual, expected, strict=True)
    return {
        name: significant(float((candidate.from_native(a)[:1, :, : e.shape[2]].double() - e).abs().max()), 3)
        for name, a, e in named
    }


def measure_time(
    case: Case, suite: Suite, candidates: list[Candidate], threads: int, rounds: int, deadline: float, device: str
) -> dict[str, Any]:
    """One record: every candidate on one case, in rounds of random order until ``rounds`` are done or it is late."""
    torch.set_num_threads(threads)
    inputs = make_inputs(case, device)
    expected = expected_results(case, inputs)
    gemm_watch = Stopwatch(gemm(case.dtype, device), device)
    gemm_watch.sample()
    results: dict[str, dict[str, Any]] = {}
    watches: dict[tuple[str, str], Stopwatch] = {}
    for candidate in candidates:
        reason = candidate.why_not(case, device)
        if isinstance(candidate, Softmax) and case.flops("backward") > SLOW_SECONDS * gemm_rate(gemm_watch):
            reason = f"matrix products in {case.dtype} run at {gemm_rate(gemm_watch) / 1e9:.0f} GFLOP/s here"
        if reason:
            results[candidate.name] = {"unsupported": reason}
            continue
        prepared = candidate.prepare(case, inputs)
        try:
            results[candidate.name] = {"error": errors(candidate, prepared, expected)}
        except RuntimeError as declined:  # a peer's way to say that it has no kernel; ours has one
            if candidate.name == OURS:
                raise
            results[candidate.name] = {"unsupported": str(declined).partition("\n")[0]}
            continue
        for direction in suite.directions:
            call = prepared.forward if direction == "forward" else prepared.backward
            watches[candidate.name, direction] = Stopwatch(call, device, candidate.context)
    del expected

    shuffle = random.Random(0).shuffle
    order = [gemm_watch, *watches.values()]
    done = 0
    while done < MIN_ROUNDS or (done < rounds and time.monotonic() < deadline):
        shuffle(order)
        for watch in order:
            watch.sample()
        done += 1

    for (name, direction), watch in watches.items():
        quartiles = watch.quartiles_ms()
        gflops = case.flops(direction) / (quartiles[1] * 1e6)
        results[name][direction] = {"ms": quartiles, "gflops": significant(gflops, 4)}
    gemm_gflops = significant(gemm_rate(gemm_watch) / 1e9, 4)
    return record(case, threads, results) | {"rounds": done, "gemm_gflops": gemm_gflops}


def extra_memory(name: str, case: Case, threads: int, device: str) -> float:
    """Peak bytes of forward + backward beyond inputs, output and gradients. Runs in a process of its own."""
    torch.set_num_threads(threads)
    candidate = CANDIDATES[name]
    small = replace(case, seqlen_q=64, seqlen_k=64)
    with candidate.context():
        candidate.prepare(small, make_inputs(small, device)).forward_backward()  # code and thread pools in place
        prepared = candidate.prepare(case, make_inputs(case, device))
        with PeakMemory(device) as peak:
            results = prepared.forward_backward()
    return peak.bytes - sum(x.untyped_storage().nbytes() for x in results)


def measure_memory(case: Case, candidates: list[Candidate], threads: int, device: str) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        if reason := candidate.why_not(case, device):
            results[candidate.name] = {"unsupported": reason}
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            extra = fresh.submit(extra_memory, candidate.name, case, threads, device).result()
        results[candidate.name] = {"extra_mib": round(extra / 2**20, 1)}
    return record(case, threads, results)


def record(case: Case, threads: int, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"name": case.name, "case": asdict(case), "threads": threads, "candidates": results}
