"""Measures attention against its peers and writes one JSON file per suite under OUTPUT/<machine>/.

    python benchmarks/run.py --threads 1,2 --budget 1800

Finished cells are kept: the same command again continues where an earlier run stopped, as long as commit, versions and
machine are the same; otherwise that file is started anew.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
from candidates import CANDIDATES, Candidate
from measure import measure_memory, measure_time
from suites import SUITES, Case, Suite

DEVICE = "cpu"
DTYPES = ("float64", "float32", "bfloat16", "float16")
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Cell:
    """What one record holds: every candidate on one case with one number of threads."""

    suite: str
    case: Case
    threads: int

    def matches(self, record: dict[str, Any]) -> bool:
        same_case = (record["name"], record["case"]["dtype"]) == (self.case.name, self.case.dtype)
        return same_case and record["threads"] == self.threads

    def expected_seconds(self) -> float:
        """Rough, only to divide a budget: small cases take some seconds for good medians, large ones their own time."""
        return 4.0 + sum(self.case.flops(direction) for direction in ("forward", "backward")) / 1e10


class ResultFile:
    """``{"environment": {...}, "records": [...]}``, written whole after every record."""

    def __init__(self, path: Path, environment: dict[str, Any]):
        self._path = path
        self._content: dict[str, Any] = {"environment": environment, "records": []}
        if path.exists():
            found = json.loads(path.read_text())
            if {**found["environment"], "date": ""} == {**environment, "date": ""}:
                self._content = found
            else:
                print(f"{path}: made with another commit, version or machine; starting it anew")

    def has(self, cell: Cell) -> bool:
        return any(cell.matches(record) for record in self._content["records"])

    def add(self, record: dict[str, Any]) -> None:
        self._content["records"].append(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self._content, indent=1) + "\n")
        os.replace(unfinished, self._path)


def summary(record: dict[str, Any]) -> str:
    """One line per record: medians in ms, or extra MiB in the memory suite; ours first."""
    columns = []
    for name, result in record["candidates"].items():
        if "unsupported" in result:
            text = "-"
        elif "extra_mib" in result:
            text = f"{result['extra_mib']:.1f} MiB"
        else:
            text = " + ".join(f"{result[d]['ms'][1]:.3g}" for d in ("forward", "backward") if d in result) + " ms"
        columns.append(f"{name} {text}")
    label = f"{record['name']:<38} {record['case']['dtype']:<8} {record['threads']}t"
    gemm = f"  (GEMM {record['gemm_gflops']:.0f} GFLOP/s)" if "gemm_gflops" in record else ""
    return f"{label}  " + "  ".join(columns) + gemm


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def chosen(kind: str, known: Collection[str], parser: argparse.ArgumentParser, text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such {kind}: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default=",".join(SUITES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated (default: %(default)s)")
    parser.add_argument("--threads", type=numbers, default=[1, os.cpu_count() or 1], help="comma-separated numbers")
    parser.add_argument("--rounds", type=int, default=15, help="at most this many per case (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop after about this")
    parser.add_argument("--match", default="", help="only cases whose name contains this, e.g. 'S512 D64 causal'")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.suites = chosen("suite", SUITES, parser, options.suite)
    options.candidates = chosen("candidate", CANDIDATES, parser, options.candidates)
    options.dtypes = chosen("dtype", DTYPES, parser, options.dtypes)
    options.threads = sorted(set(options.threads))
    return options


def cells(options: argparse.Namespace) -> list[Cell]:
    return [
        Cell(name, replace(case, dtype=dtype), threads)
        for name in options.suites
        for threads in options.threads
        for dtype in options.dtypes
        for case in SUITES[name].cases
        if options.match in case.name
    ]


def measure(cell: Cell, candidates: list[Candidate], rounds: int, seconds: float) -> dict[str, Any]:
    suite: Suite = SUITES[cell.suite]
    if suite.measures_memory:
        return measure_memory(cell.case, candidates, cell.threads, DEVICE)
    return measure_time(cell.case, suite, candidates, cell.threads, rounds, time.monotonic() + seconds, DEVICE)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    end = time.monotonic() + options.budget
    environment = machine.environment(DEVICE)
    folder = options.output / machine.slug(environment)
    environment["date"] = machine.today()
    files = {suite: ResultFile(folder / f"{suite}.json", environment) for suite in options.suites}
    candidates = [CANDIDATES[name] for name in options.candidates]

    todo = [cell for cell in cells(options) if not files[cell.suite].has(cell)]
    print(f"{len(todo)} cells to measure, into {folder}", flush=True)
    while todo and time.monotonic() < end:
        share = todo[0].expected_seconds() / sum(cell.expected_seconds() for cell in todo)
        cell = todo.pop(0)
        record = measure(cell, candidates, options.rounds, (end - time.monotonic()) * share)
        files[cell.suite].add(record)
        print(summary(record), flush=True)
    if todo:
        print(f"the budget is spent; {len(todo)} cells are left: the same command continues with them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
