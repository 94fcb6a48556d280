"""Time of one call, as the mean over a batch of them."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Context = Callable[[], AbstractContextManager[object]]

BATCH_SECONDS = 0.03  # a sample is the mean of as many calls as take about this long
WARM_SECONDS = 0.06  # a GPU's clock follows its power, averaged over about this long: each call has to make its own
MOST_CALLS = 3000


def significant(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")


class Stopwatch:
    """Times one call; ``sample()`` adds a measurement.

    Another candidate had the machine before. On a CPU it leaves its data in the caches: a short call is made once
    beforehand, a long one warms itself. On a GPU it leaves clock and temperature: calls are made back to back for a
    while, and those that are timed follow without a gap.
    """

    def __init__(self, call: Callable[[], object], device: str, context: Context = nullcontext):
        self._call, self._context = call, context
        self._time = self._time_on_gpu if device == "cuda" else self._time_on_cpu
        self.seconds: list[float] = []
        with context():
            self._time(1, 0)  # builds what is built once: graphs, kernels, thread pools
            seconds = self._time(1, 0)
            if device == "cuda":  # a lone short call is mostly launching
                seconds = self._time(calls_for(BATCH_SECONDS / 10, seconds), 1)
        self._calls = calls_for(BATCH_SECONDS, seconds)
        self._warm_calls = math.ceil(WARM_SECONDS / seconds) if device == "cuda" else int(self._calls > 1)

    def _time_on_cpu(self, calls: int, warm_calls: int) -> float:
        for _ in range(warm_calls):
            self._call()
        start = time.perf_counter()
        for _ in range(calls):
            self._call()
        return (time.perf_counter() - start) / calls

    def _time_on_gpu(self, calls: int, warm_calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(warm_calls):
            self._call()
        start.record()
        for _ in range(calls):
            self._call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def sample(self) -> None:
        with self._context():
            self.seconds.append(self._time(self._calls, self._warm_calls))

    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles_ms(self) -> list[float]:
        """First quartile, median, third quartile."""
        return [significant(q * 1e3, 4) for q in statistics.quantiles(self.seconds, n=4, method="inclusive")]


def calls_for(seconds: float, each: float) -> int:
    return max(1, min(MOST_CALLS, round(seconds / each)))
