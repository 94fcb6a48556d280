"""Writes the tables of README.md and benchmarks/README.md from the result files, between markers that name them.

    python benchmarks/tables.py            # or: make tables

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

EMPTY = "Nothing was measured yet."
OURS = "flash_attn_ext"
TORCH = "sdpa_flash"
TITLES = {OURS: "ours", TORCH: "SDPA flash", "sdpa_math": "SDPA math", "softmax": "softmax"}
DIRECTIONS = ("forward", "backward")
Record = dict[str, Any]


def load(results: Path, suite: str) -> Iterator[tuple[Record, list[Record], Path]]:
    """(environment, records, file) of the suite for every machine, in the order of their folders' names."""
    for path in sorted(results.glob(f"*/{suite}.json")):
        content = json.loads(path.read_text())
        yield content["environment"], content["records"], path


def machine_name(environment: Record) -> str:
    if "gpu" in environment:
        return str(environment["gpu"])
    levels = {"amx": "AMX", "avx512": "AVX-512", "avx2": "AVX2"}
    level = str(environment["cpu_level"])
    model = re.sub(r"\((R|TM)\)", "", str(environment["cpu"]))
    return f"{model}, {levels.get(level, level)}"


def heading(environment: Record) -> str:
    """Machine, versions and commit: what a number means nothing without."""
    return f"{machine_name(environment)}, torch {environment['torch']}, commit {environment['commit']}:"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def gflops(record: Record, candidate: str, direction: str) -> float | None:
    found = record["candidates"].get(candidate, {}).get(direction)
    return None if found is None else float(found["gflops"])


def ratio_to(record: Record, peers: list[str], direction: str) -> float | None:
    """Our speed over the best of the peers' that measured this record."""
    ours = gflops(record, OURS, direction)
    speeds = [speed for peer in peers if (speed := gflops(record, peer, direction)) is not None]
    return ours / max(speeds) if ours is not None and speeds else None


def ratios(records: list[Record], peers: list[str], direction: str) -> list[float]:
    return [ratio for record in records if (ratio := ratio_to(record, peers, direction)) is not None]


def groups(records: list[Record]) -> Iterator[tuple[str, int, list[Record]]]:
    """(dtype, threads, their records), in the order in which they were measured."""
    keys = dict.fromkeys((record["case"]["dtype"], record["threads"]) for record in records)
    for dtype, threads in keys:
        yield (
            dtype,
            threads,
            [record for record in records if (record["case"]["dtype"], record["threads"]) == (dtype, threads)],
        )


def measured(records: list[Record]) -> dict[str, str]:
    """Candidates that took part in any of the records, with their titles."""
    return {name: title for name, title in TITLES.items() if any(name in record["candidates"] for record in records)}


def times(value: float) -> str:
    return f"{value:.2f}x"


def speedup(results: Path) -> str:
    """Per machine, dtype and threads: speed against torch, as geometric mean and as the worst case."""
    blocks = []
    for environment, records, _ in load(results, "attention"):
        rows = []
        for dtype, threads, group in groups(records):
            row = [dtype, str(threads)]
            for direction in DIRECTIONS:
                torch_ratios = ratios(group, [TORCH], direction)
                best_ratios = ratios(group, [peer for peer in TITLES if peer != OURS], direction)
                row += [times(geometric_mean(torch_ratios)), times(min(best_ratios))]
            rows.append(row)
        header = ["dtype", "threads", "forward, mean", "forward, least", "backward, mean", "backward, least"]
        blocks.append(heading(environment) + "\n\n" + table(header, rows))
    return "\n\n".join(blocks)


def speed(results: Path) -> str:
    """Every case: GFLOP/s of every candidate, forward and backward."""
    blocks = []
    for environment, records, _ in load(results, "attention"):
        titles = measured(records)
        for dtype, threads, group in groups(records):
            rows = []
            for record in group:
                row = [record["name"]]
                for direction in DIRECTIONS:
                    row += [cell(gflops(record, candidate, direction)) for candidate in titles]
                rows.append([*row, f"{record['gemm_gflops']:.0f}"])
            header = ["case", *(f"{title} {way}" for way in ("fwd", "bwd") for title in titles.values()), "GEMM"]
            title = f"{heading(environment)[:-1]}, {dtype}, {threads} thread{'s' if threads > 1 else ''}, GFLOP/s:"
            blocks.append(title + "\n\n" + table(header, rows))
    return "\n\n".join(blocks)


def cell(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def one_token(results: Path) -> str:
    """One query row against a long context: microseconds."""
    blocks = []
    for environment, records, _ in load(results, "one_token"):
        titles, rows = measured(records), []
        for record in records:
            entries = [record["candidates"].get(candidate, {}).get("forward") for candidate in titles]
            micros = [cell(entry and entry["ms"][1] * 1e3) for entry in entries]
            rows.append([record["name"], record["case"]["dtype"], str(record["threads"]), *micros])
        blocks.append(heading(environment) + "\n\n" + table(["case", "dtype", "threads", *titles.values()], rows))
    return "\n\n".join(blocks)


def memory(results: Path) -> str:
    """Peak MiB of forward + backward beyond inputs, output and gradients."""
    blocks = []
    for environment, records, _ in load(results, "memory"):
        titles, rows = measured(records), []
        for record in records:
            entries = [record["candidates"].get(candidate, {}).get("extra_mib") for candidate in titles]
            row = [record["name"], record["case"]["dtype"], str(record["threads"])]
            rows.append(row + [cell(entry) for entry in entries])
        blocks.append(heading(environment) + "\n\n" + table(["case", "dtype", "threads", *titles.values()], rows))
    return "\n\n".join(blocks)


def error(results: Path) -> str:
    """Largest error against float64 over all cases, per dtype and tensor."""
    tensors = ("out", "dq", "dk", "dv")
    blocks = []
    for environment, records, _ in load(results, "attention"):
        rows = []
        for dtype in dict.fromkeys(record["case"]["dtype"] for record in records):
            for candidate, title in measured(records).items():
                found = [
                    r["candidates"].get(candidate, {}).get("error") for r in records if r["case"]["dtype"] == dtype
                ]
                worst = [max(e[name] for e in found if e) for name in tensors] if any(found) else []
                rows.append([dtype, title, *(f"{value:.1e}" for value in worst)])
        blocks.append(heading(environment) + "\n\n" + table(["dtype", "candidate", *tensors], rows))
    return "\n\n".join(blocks)


def plots(results: Path) -> str:
    """The plots that plot.py drew for each machine."""
    links = []
    for environment, _, path in load(results, "attention"):
        for kind in ("speed", "memory"):
            links.append(f"![{kind} on {machine_name(environment)}](docs/plots/{path.parent.name}-{kind}.png)")
    return "\n\n".join(links)


TABLES: dict[str, Callable[[Path], str]] = {
    made.__name__: made for made in (speedup, speed, one_token, memory, error, plots)
}


def renewed(page: str, results: Path = RESULTS) -> str:
    """The page with every marked table made anew."""
    return MARKED.sub(lambda mark: f"{mark[1]}\n{TABLES[mark[2]](results) or EMPTY}\n\n{mark[3]}", page)


def main() -> int:
    for path in PAGES:
        text = path.read_text()
        if (new := renewed(text)) != text:
            path.write_text(new)
            print(f"{path.relative_to(ROOT)}: tables renewed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
