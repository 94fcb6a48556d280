"""The longest sequence of which forward and backward stay within some memory, found and then run.

Memory is the peak of resident memory of a process of its own, from before there are inputs: inputs, output, gradients
and everything between.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from candidate import make_inputs
from candidates import CANDIDATES, Candidate
from measure import Setup, declined, prepare, record
from suites import Case

from flash_attn_ext.demo.memory import PeakMemory

MOST_SECONDS = 480.0  # of one forward and backward: what would take longer is not run
_FIRST = (1024, 2048)  # lengths that tell how memory and time grow


@dataclass(frozen=True)
class Run:
    seqlen: int
    mib: float
    seconds: float


def of_length(case: Case, seqlen: int) -> Case:
    return replace(case, seqlen_q=seqlen, seqlen_k=seqlen)


def lengths() -> Iterator[int]:
    """1024 times 1, 1.25, 1.5, 1.75, 2, 2.5, ..."""
    octave = 256
    while True:
        yield from (quarter * octave for quarter in range(4, 8))
        octave *= 2


def measured_run(name: str, case: Case, threads: int, device: str) -> Run:
    """One forward and backward, in this process, which must not have had another as large."""
    prepare(device, threads)
    candidate = CANDIDATES[name]
    with candidate.context():
        small = of_length(case, 64)
        candidate.prepare(small, make_inputs(small, device)).forward_backward()  # code and thread pools in place
        start = time.monotonic()
        with PeakMemory(device) as peak:
            candidate.prepare(case, make_inputs(case, device)).forward_backward()
    return Run(case.seqlen_q, round(peak.bytes / 2**20, 1), round(time.monotonic() - start, 2))


def run_in_fresh_process(name: str, case: Case, setup: Setup, seqlen: int) -> Run:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measured_run, name, of_length(case, seqlen), setup.threads, setup.device).result()


def expected(before: Run, last: Run, seqlen: int) -> tuple[float, float]:
    """(MiB, seconds) at seqlen: memory grows with the power that two runs show, at least linearly, time with 2."""
    growth = seqlen / last.seqlen
    power = math.log(last.mib / before.mib) / math.log(last.seqlen / before.seqlen)
    return last.mib * growth ** max(power, 1.0), last.seconds * growth**2


def search(
    measured: Callable[[int], Run], limit_mib: float, most_seconds: float = MOST_SECONDS
) -> tuple[Run, Literal["memory", "time"]]:
    """The longest run within the limit, and what keeps longer ones out. measured(seqlen) runs one.

    The longest that growth promises is run; where it turns out larger than the limit, the next shorter one is. What
    growth says is too large, or takes too long, is not run.
    """
    before, last = (measured(seqlen) for seqlen in _FIRST)
    if last.mib > limit_mib:
        raise ValueError(f"limit_mib must be more than a sequence of {last.seqlen} takes, {last.mib}; got {limit_mib}")
    too_large = math.inf
    while True:
        chosen, stopped = last.seqlen, "memory"
        for seqlen in lengths():
            mib, seconds = expected(before, last, seqlen)
            if mib > limit_mib or seqlen >= too_large:
                break
            if seconds > most_seconds:
                stopped = "time"
                break
            chosen = max(chosen, seqlen)
        if chosen == last.seqlen:
            return last, stopped
        run = measured(min(chosen, 16 * last.seqlen))  # further away, growth from short runs is a poor guide
        if run.mib > limit_mib:
            too_large = run.seqlen
        else:
            before, last = last, run


def measure_longest(
    case: Case, limit_mib: float, candidates: list[Candidate], setup: Setup, lost: dict[str, str]
) -> dict[str, Any]:
    """One record: of every candidate the longest run, the limit, and why there is no longer one."""
    results: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        if reason := lost.get(candidate.name) or candidate.why_not(case, setup.device):
            results[candidate.name] = {"unsupported": reason}
            continue
        try:
            run, stopped = search(partial(run_in_fresh_process, candidate.name, case, setup), limit_mib)
            results[candidate.name] = {**asdict(run), "limit_mib": limit_mib, "stopped": stopped}
        except Exception as error:
            results[candidate.name] = {"unsupported": declined(candidate, error, setup.device)}
    return record(case, setup.threads, results)
