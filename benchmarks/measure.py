"""How it is measured: time in interleaved rounds, error against float64, peak memory."""

import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import machine
import torch
from accuracy import errors, expected_results
from candidate import make_inputs
from candidates import CANDIDATES, OURS, Candidate
from stopwatch import Stopwatch, significant
from suites import Case, Suite
from torch import Tensor
from torch_candidates import Softmax

from flash_attn_ext.demo.memory import PeakMemory

Results = dict[str, dict[str, Any]]

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough to fill the machine
MIN_ROUNDS = 3
SLOW_SECONDS = 20.0  # plain softmax attention is left out where its matrix products alone would take longer in a call


class DeviceLostError(Exception):
    """A candidate failed so that this process can use the device no more."""

    def __init__(self, candidate: str, reason: str):
        super().__init__(f"{candidate}: {reason}")
        self.candidate, self.reason = candidate, reason


@dataclass(frozen=True)
class Setup:
    """Where to measure, and for how long."""

    device: str
    threads: int
    rounds: int
    seconds: float


def device_lost(device: str) -> bool:
    """Whether an error has left this process without its GPU; also frees what is only cached."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def declined(candidate: Candidate, error: Exception, device: str) -> str:
    """What a candidate that failed gave as its reason; a peer's way to say that it has no kernel. Ours has one."""
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if device_lost(device):
        raise DeviceLostError(candidate.name, reason) from error
    if candidate.name == OURS:
        raise error
    return reason


def gemm(dtype: str, device: str) -> Callable[[], Tensor]:
    size = GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b


def gemm_rate(watch: Stopwatch, device: str) -> float:
    """FLOP/s of the products that ``gemm`` makes."""
    return 2 * GEMM_SIZE[device] ** 3 / watch.median()


def prepare(device: str, threads: int) -> None:
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 is measured as float32
        torch.cuda.empty_cache()
    else:
        torch.set_num_threads(threads)


def measure_time(
    case: Case, suite: Suite, candidates: list[Candidate], setup: Setup, lost: dict[str, str]
) -> dict[str, Any]:
    """One record: every candidate on one case, in rounds of random order until all are done or it is late.

    ``lost`` names candidates that cost an earlier process the device, with the reason.
    """
    device, deadline = setup.device, time.monotonic() + setup.seconds
    prepare(device, setup.threads)
    inputs = make_inputs(case, device)
    expected = expected_results(case, inputs)
    gemm_watch = Stopwatch(gemm(case.dtype, device), device)
    gemm_watch.sample()
    results: Results = {}
    watches: dict[str, dict[str, Stopwatch]] = {}
    for candidate in candidates:
        reason = lost.get(candidate.name) or candidate.why_not(case, device)
        if isinstance(candidate, Softmax) and case.flops("backward") > SLOW_SECONDS * gemm_rate(gemm_watch, device):
            rate = gemm_rate(gemm_watch, device) / 1e9
            reason = reason or f"matrix products in {case.dtype} run at {rate:.0f} GFLOP/s here"
        if reason:
            results[candidate.name] = {"unsupported": reason}
            continue
        try:
            prepared = candidate.prepare(case, inputs)
            results[candidate.name] = errors(candidate, case, prepared, expected)
            calls = {"forward": prepared.forward, "backward": prepared.backward}
            watches[candidate.name] = {
                direction: Stopwatch(calls[direction], device, candidate.context)
                for direction in suite.directions
                if direction in candidate.directions
            }
        except Exception as error:
            results[candidate.name] = {"unsupported": declined(candidate, error, device)}
    del expected

    shuffle = random.Random(0).shuffle
    done, state = 0, None
    while done < MIN_ROUNDS or (done < setup.rounds and time.monotonic() < deadline):
        if done == MIN_ROUNDS - 1 and device == "cuda":
            state = machine.GPUState()
        order = [(name, watch) for name, timed in watches.items() for watch in timed.values()]
        order.append(("", gemm_watch))
        shuffle(order)
        for name, watch in order:
            if name and name not in watches:
                continue
            try:
                watch.sample()
            except Exception as error:
                if not name:
                    raise
                results[name] = {"unsupported": declined(CANDIDATES[name], error, device)}
                del watches[name]
        done += 1

    for name, timed in watches.items():
        for direction, watch in timed.items():
            quartiles = watch.quartiles_ms()
            gflops = case.flops(direction) / (quartiles[1] * 1e6)
            results[name][direction] = {"ms": quartiles, "gflops": significant(gflops, 4)}
    gemm_gflops = significant(gemm_rate(gemm_watch, device) / 1e9, 4)
    made = record(case, setup.threads, results) | {"rounds": done, "gemm_gflops": gemm_gflops}
    return made | {"gpu": state.read()} if state else made


def extra_memory(name: str, case: Case, threads: int, device: str) -> float:
    """Peak bytes of forward + backward beyond inputs, output and gradients."""
    prepare(device, threads)
    candidate = CANDIDATES[name]
    with candidate.context():
        if device == "cuda":  # the allocator counts anew each time: what a first call compiles for the case is in place
            prepared = candidate.prepare(case, make_inputs(case, device))
            prepared.forward_backward()
        else:  # a process has but one peak: code and thread pools in place
            small = replace(case, seqlen_q=64, seqlen_k=64)
            candidate.prepare(small, make_inputs(small, device)).forward_backward()
            prepared = candidate.prepare(case, make_inputs(case, device))
        with PeakMemory(device) as peak:
            results = prepared.forward_backward()
    return peak.bytes - sum(x.untyped_storage().nbytes() for x in results)


def measure_memory(case: Case, candidates: list[Candidate], setup: Setup, lost: dict[str, str]) -> dict[str, Any]:
    results: Results = {}
    for candidate in candidates:
        if reason := lost.get(candidate.name) or candidate.why_not(case, setup.device):
            results[candidate.name] = {"unsupported": reason}
            continue
        arguments = (candidate.name, case, setup.threads, setup.device)
        try:
            if setup.device == "cuda":
                extra = extra_memory(*arguments)
            else:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                    extra = fresh.submit(extra_memory, *arguments).result()
            results[candidate.name] = {"extra_mib": round(extra / 2**20, 1)}
        except Exception as error:
            results[candidate.name] = {"unsupported": declined(candidate, error, setup.device)}
    return record(case, setup.threads, results)


def record(case: Case, threads: int, results: Results) -> dict[str, Any]:
    return {"name": case.name, "case": asdict(case), "threads": threads, "candidates": results}
