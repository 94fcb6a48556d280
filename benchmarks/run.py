"""Measures attention against its peers and writes one JSON file per suite under OUTPUT/<machine>/.

    python benchmarks/run.py --threads 1,2 --budget 1800
    python benchmarks/run.py --device cuda --suite prefill,gqa --budget 600

Finished cells are kept: the same command again continues where an earlier run stopped, as long as commit, versions and
machine are the same; otherwise that file is started anew.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch
from candidates import CANDIDATES, Candidate, usual_candidates
from longest import measure_longest
from measure import DeviceLostError, Setup, device_lost, measure_memory, measure_time
from package_candidates import take_fa3_from
from suites import SUITES, Case

DTYPES = ("float64", "float32", "bfloat16", "float16")
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Cell:
    """What one record holds: every candidate on one case with one number of threads."""

    suite: str
    case: Case
    threads: int

    @property
    def key(self) -> str:
        return f"{self.case.name}, {self.case.dtype}"

    def matches(self, record: dict[str, Any]) -> bool:
        same_case = (record["name"], record["case"]["dtype"]) == (self.case.name, self.case.dtype)
        return same_case and record["threads"] == self.threads

    def expected_seconds(self, device: str) -> float:
        """Rough, only to divide a budget: small cases take some seconds for good medians, large ones their own time.

        On a GPU every sample takes about as long.
        """
        if device == "cuda":
            return 20.0
        return 4.0 + sum(self.case.flops(direction) for direction in ("forward", "backward")) / 1e10


class ResultFile:
    """``{"environment": {...}, "records": [...]}``, written whole after every record.

    Candidates that cost a process the device are under "lost", until the cell they did it in is done.
    """

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

    def lost(self, cell: Cell) -> dict[str, str]:
        """Reasons by candidate."""
        return dict(self._content.get("lost", {}).get(cell.key, {}))

    def lose(self, cell: Cell, candidate: str, reason: str) -> None:
        self._content.setdefault("lost", {}).setdefault(cell.key, {})[candidate] = reason
        self._write()

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        self._content["records"].append(record)
        self._content.get("lost", {}).pop(cell.key, None)
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self._content, indent=1) + "\n")
        os.replace(unfinished, self._path)


def summary(record: dict[str, Any]) -> str:
    """One line per record: medians in ms, or what suites about memory measure, of those who computed it; ours first."""
    columns = []
    for name, result in record["candidates"].items():
        if "unsupported" in result:
            continue
        if "extra_mib" in result:
            text = f"{result['extra_mib']:.1f} MiB"
        elif "limit_mib" in result:
            text = f"{result['seqlen']} in {result['mib']:.0f} MiB and {result['seconds']:.0f} s"
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
    usual_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SUITES, default=usual_device, help="default here: %(default)s")
    parser.add_argument("--suite", help="comma-separated (default: all of the device)")
    parser.add_argument("--candidates", help="comma-separated (default: all of the device)")
    parser.add_argument("--dtypes", help="comma-separated (default: what each suite is about)")
    parser.add_argument("--threads", type=numbers, default=[1, os.cpu_count() or 1], help="comma-separated; CPU only")
    parser.add_argument("--rounds", type=int, help="at most this many per case (default: 15 on a CPU, 7 on a GPU)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop after about this")
    parser.add_argument("--match", default="", help="only cases whose name contains this, e.g. 'S512 D64 causal'")
    parser.add_argument("--fa3", type=Path, metavar="DIR", help="folder with FlashAttention 3, if not installed")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device, known = options.device, SUITES[options.device]
    options.suites = chosen("suite", known, parser, options.suite) if options.suite else list(known)
    options.candidates = (
        chosen("candidate", CANDIDATES, parser, options.candidates) if options.candidates else usual_candidates(device)
    )
    options.dtypes = chosen("dtype", DTYPES, parser, options.dtypes) if options.dtypes else None
    options.threads = sorted(set(options.threads)) if device == "cpu" else [1]
    options.rounds = options.rounds or (15 if device == "cpu" else 7)
    return options


def cells(options: argparse.Namespace) -> list[Cell]:
    return [
        Cell(name, replace(case, dtype=dtype), threads)
        for name in options.suites
        for threads in options.threads
        for dtype in options.dtypes or SUITES[options.device][name].dtypes
        for case in SUITES[options.device][name].cases
        if options.match in case.name
    ]


def measure(cell: Cell, candidates: list[Candidate], setup: Setup, lost: dict[str, str]) -> dict[str, Any]:
    suite = SUITES[setup.device][cell.suite]
    if suite.limit_mib is not None:
        return measure_longest(cell.case, suite.limit_mib, candidates, setup, lost)
    if suite.measures_memory:
        return measure_memory(cell.case, candidates, setup, lost)
    return measure_time(cell.case, suite, candidates, setup, lost)


def tell_reasons(record: dict[str, Any], told: set[tuple[str, str]]) -> None:
    """Prints why candidates are missing, each reason once."""
    for name, result in record["candidates"].items():
        if (told_now := (name, result.get("unsupported", ""))) not in told and told_now[1]:
            told.add(told_now)
            print(f"    {name}: {told_now[1]}", flush=True)


def start_again(seconds: float) -> None:
    """The same command in a fresh process, which finds in the files what was done."""
    sys.stdout.flush()
    os.closerange(3, 4096)  # whatever of the lost device is still open
    os.execv(sys.executable, [sys.executable, *sys.argv, "--budget", str(max(0.0, seconds))])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    end = time.monotonic() + options.budget
    if options.fa3:
        take_fa3_from(options.fa3)
    environment = machine.environment(options.device)
    folder = options.output / machine.slug(environment)
    environment["date"] = machine.today()
    files = {suite: ResultFile(folder / f"{suite}.json", environment) for suite in options.suites}
    candidates = [CANDIDATES[name] for name in options.candidates]

    todo = [cell for cell in cells(options) if not files[cell.suite].has(cell)]
    print(f"{len(todo)} cells to measure, into {folder}", flush=True)
    told: set[tuple[str, str]] = set()
    failed = 0
    while todo and time.monotonic() < end:
        share = todo[0].expected_seconds(options.device) / sum(cell.expected_seconds(options.device) for cell in todo)
        cell = todo.pop(0)
        file = files[cell.suite]
        setup = Setup(options.device, cell.threads, options.rounds, (end - time.monotonic()) * share)
        try:
            record = measure(cell, candidates, setup, file.lost(cell))
        except DeviceLostError as error:
            file.lose(cell, error.candidate, error.reason)
            print(f"{cell.key}: {error}; the device is lost to this process: starting again", flush=True)
            start_again(end - time.monotonic())
        except Exception:  # ours failed: nothing to record, but the other cells can still be measured
            failed += 1
            print(f"{cell.key}: not measured", flush=True)
            traceback.print_exc()
            if device_lost(options.device):
                break
        else:
            file.add(cell, record)
            print(summary(record), flush=True)
            tell_reasons(record, told)
    if failed:
        print(f"{failed} cells failed")
    if todo:
        print(f"{len(todo)} cells are left: the same command continues with them")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
