"""Writes the tables of README.md, benchmarks/README.md and pages of docs from the result files, between markers.

    python benchmarks/tables.py            # or: make tables

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. ``tried.json`` is written by hand, from what was
measured while a kernel was made: before and after, in TFLOP/s of one run or in a unit of time.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from suites import DIRECTIONS, GPU_SUITES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs" / f"{page}.md" for page in ("examples", "kernels", "numerics", "training")),
)
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

EMPTY = "Nothing was measured yet."
OURS = "flash_attn_ext"
TORCH = "sdpa_flash"
TITLES = {
    OURS: "ours",
    TORCH: "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
    "sdpa_efficient": "SDPA efficient",
    "sdpa_math": "SDPA math",
    "torch_varlen": "torch varlen",
    "flex_attention": "FlexAttention",
    "softmax": "softmax",
    "fa2": "FA2",
    "fa2_deterministic": "FA2 deterministic",
    "fa3": "FA3",
    "fa3_deterministic": "FA3 deterministic",
    "fa4": "FA4",
    "fa4_deterministic": "FA4 deterministic",
    "xformers": "xformers",
}
PEERS = [name for name in TITLES if name != OURS]
DETERMINISTIC = [name for name in PEERS if name.endswith("_deterministic")]  # in the backward, as ours is
GPU_TIMED = [name for name, suite in GPU_SUITES.items() if not suite.measures_memory]
Record = dict[str, Any]


def load(results: Path, suite: str) -> Iterator[tuple[Record, list[Record], Path]]:
    """(environment, records, file) of the suite for every machine, in the order of their folders' names."""
    for path in sorted(results.glob(f"*/{suite}.json")):
        content = json.loads(path.read_text())
        yield content["environment"], content["records"], path


def machine_name(environment: Record) -> str:
    if "gpu" in environment:
        return str(environment["gpu"])
    levels = {"amx": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512": "AVX-512", "avx2": "AVX2"}
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


def best_of(record: Record, peers: list[str], direction: str) -> tuple[float, str] | None:
    """GFLOP/s and name of the fastest of the peers that measured this record."""
    speeds = [(speed, peer) for peer in peers if (speed := gflops(record, peer, direction)) is not None]
    return max(speeds, default=None)


def ratio_to(record: Record, peers: list[str], direction: str) -> float | None:
    """Our speed over the best of the peers' that measured this record."""
    ours, best = gflops(record, OURS, direction), best_of(record, peers, direction)
    return ours / best[0] if ours is not None and best else None


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
    """Candidates that computed any of the records, with their titles."""
    entries = [record["candidates"] for record in records]
    return {
        name: title
        for name, title in TITLES.items()
        if any(name in entry and "unsupported" not in entry[name] for entry in entries)
    }


def times(value: float) -> str:
    return f"{value:.2f}x"


def speedup(results: Path) -> str:
    """Per machine, dtype and threads: speed against torch, as geometric mean and as the worst case."""
    blocks = []
    for environment, records, _ in load(results, "attention"):
        rows = []
        for dtype, threads, group in groups(records):
            row = [dtype, str(threads), str(len(group))]
            for direction in DIRECTIONS:
                torch_ratios = ratios(group, [TORCH], direction)
                best_ratios = ratios(group, PEERS, direction)
                row += [times(geometric_mean(torch_ratios)), times(min(best_ratios))]
            rows.append(row)
        header = ["dtype", "threads", "cases"]
        header += [f"{way}, {what}" for way in DIRECTIONS for what in ("mean", "least")]
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
            threads = "-" if "gpu" in environment else str(record["threads"])
            rows.append([record["name"], record["case"]["dtype"], threads, *(cell(entry) for entry in entries)])
        blocks.append(heading(environment) + "\n\n" + table(["case", "dtype", "threads", *titles.values()], rows))
    return "\n\n".join(blocks)


def longest(results: Path) -> str:
    """The longest sequence of which forward and backward stay within the limit."""
    blocks = []
    for environment, records, _ in load(results, "longest"):
        titles, rows = measured(records), []
        for record in records:
            entries = [record["candidates"].get(candidate, {}) for candidate in titles]
            name = re.sub(r" S\d+", "", record["name"])  # the length is the result
            rows.append([name, record["case"]["dtype"], str(record["threads"]), *map(longest_run, entries)])
        blocks.append(heading(environment) + "\n\n" + table(["case", "dtype", "threads", *titles.values()], rows))
    return "\n\n".join(blocks)


def longest_run(entry: Record) -> str:
    if "limit_mib" not in entry:
        return "-"
    more = "more than " if entry["stopped"] == "time" else ""
    return f"{more}{entry['seqlen']} ({entry['mib']:.0f} MiB)"


def error_table(records: list[Record]) -> str:
    tensors = ("out", "dq", "dk", "dv")
    rows = []
    for dtype in dict.fromkeys(record["case"]["dtype"] for record in records):
        for candidate, title in measured(records).items():
            found = [r["candidates"].get(candidate, {}).get("error") for r in records if r["case"]["dtype"] == dtype]
            if any(found):  # else it does not take this dtype
                worst = [max(e[name] for e in found if e) for name in tensors]
                rows.append([dtype, title, *(f"{value:.1e}" for value in worst)])
    return table(["dtype", "candidate", *tensors], rows)


def error(results: Path) -> str:
    """Largest error against float64 over all cases, per dtype and tensor."""
    blocks = [
        f"{heading(environment)}\n\n{error_table(records)}" for environment, records, _ in load(results, "attention")
    ]
    return "\n\n".join(blocks)


def gpu_files(results: Path) -> Iterator[tuple[str, Record, list[Record]]]:
    """(suite, environment, records) of everything that was timed on a GPU."""
    for suite in GPU_TIMED:
        for environment, records, _ in load(results, suite):
            if records:
                yield suite, environment, records


def mean_and_least(records: list[Record], peers: list[str], direction: str) -> list[str]:
    found = ratios(records, peers, direction)
    return [times(geometric_mean(found)), times(min(found))] if found else ["-", "-"]


def gpu_speedup(results: Path) -> str:
    """Per GPU, suite and dtype: our speed over the best peer's of each case."""
    rows: dict[str, list[list[str]]] = {}
    for suite, environment, records in gpu_files(results):
        for dtype, _, group in groups(records):
            peers_here = [title for name, title in measured(group).items() if name != OURS]
            row = [suite, dtype, str(len(group)), ", ".join(peers_here)]
            for peers, direction in ((PEERS, "forward"), (PEERS, "backward"), (DETERMINISTIC, "backward")):
                row += mean_and_least(group, peers, direction)
            rows.setdefault(heading(environment), []).append(row)
    ways = ("forward", "backward", "backward, deterministic peers")
    header = ["suite", "dtype", "cases", "peers", *(f"{way}, {what}" for way in ways for what in ("mean", "least"))]
    return "\n\n".join(f"{title}\n\n{table(header, lines)}" for title, lines in rows.items())


def against_best(record: Record, peers: list[str], direction: str) -> list[str]:
    """TFLOP/s and name of the best of the peers, and our speed over theirs."""
    best, ratio = best_of(record, peers, direction), ratio_to(record, peers, direction)
    return [f"{best[0] / 1e3:.0f} {TITLES[best[1]]}" if best else "-", times(ratio) if ratio else "-"]


def gpu_speed(results: Path) -> str:
    """Every case on a GPU: TFLOP/s of ours and of the best peer; a deterministic one again for the backward."""
    blocks = []
    header = ["case", "dtype", "fwd ours", "fwd best", "", "bwd ours", "bwd best", "", "bwd best deterministic", ""]
    for suite, environment, records in gpu_files(results):
        rows = []
        for record in records:
            row = [record["name"], record["case"]["dtype"]]
            for direction in DIRECTIONS:
                ours = gflops(record, OURS, direction)
                row += [cell(ours and ours / 1e3), *against_best(record, PEERS, direction)]
            rows.append(row + against_best(record, DETERMINISTIC, "backward"))
        blocks.append(f"{suite}, {heading(environment)[:-1]}, TFLOP/s:\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def option_costs(results: Path) -> str:
    """Our time with an option in units of that without, of the same shape."""
    without = {"softcap": 0.0, "alibi": False, "sinks": False, "dropout": 0.0}
    blocks = []
    for environment, records, _ in load(results, "options"):
        plain = {str(record["case"]): record for record in records}
        rows = []
        for record in records:
            base = plain.get(str(record["case"] | without))
            if base is None or base is record:
                continue
            speeds = [(gflops(base, OURS, way), gflops(record, OURS, way)) for way in DIRECTIONS]
            rows.append([record["name"], *(times(a / b) if a and b else "-" for a, b in speeds)])
        blocks.append(f"{heading(environment)}\n\n{table(['case', *DIRECTIONS], rows)}")
    return "\n\n".join(blocks)


def slower(results: Path) -> str:
    """Per machine, every case in which a peer was faster, the worst first."""
    rows: dict[str, list[tuple[float, list[str]]]] = {}
    for suite in ("attention", "one_token", *GPU_TIMED):
        for environment, records, _ in load(results, suite):
            lines = rows.setdefault(heading(environment), [])
            for record in records:
                threads = "-" if "gpu" in environment else str(record["threads"])
                for direction in DIRECTIONS:
                    best, ratio = best_of(record, PEERS, direction), ratio_to(record, PEERS, direction)
                    if best and ratio is not None and ratio < 1:
                        place = [record["name"], record["case"]["dtype"], threads, direction]
                        lines.append((ratio, [*place, TITLES[best[1]], times(ratio)]))
    header = ["case", "dtype", "threads", "direction", "faster", "our speed over its"]
    return "\n\n".join(
        f"{title}\n\n{table(header, [row for _, row in sorted(lines)])}" for title, lines in rows.items() if lines
    )


def gpu_error(results: Path) -> str:
    """Largest error against float64 over all cases on a GPU, per dtype and tensor."""
    found: dict[str, list[Record]] = {}
    for _, environment, records in gpu_files(results):
        found.setdefault(heading(environment), []).extend(records)
    return "\n\n".join(f"{title}\n\n{error_table(records)}" for title, records in found.items())


def gpu_rms_error(results: Path) -> str:
    """Root mean square error on a GPU over the least of any peer in the same case: mean and largest over the cases."""
    tensors = ("out", "dq", "dk", "dv")
    rows: dict[str, list[list[str]]] = {}
    for suite, environment, records in gpu_files(results):
        for dtype in dict.fromkeys(record["case"]["dtype"] for record in records):
            ratios: dict[str, list[float]] = {name: [] for name in tensors}
            for record in (record for record in records if record["case"]["dtype"] == dtype):
                found = {name: entry.get("rms_error") for name, entry in record["candidates"].items()}
                peers = [error for name, error in found.items() if name != OURS and error]
                if found.get(OURS) and peers:
                    for name in tensors:
                        ratios[name].append(found[OURS][name] / min(error[name] for error in peers))
            if ratios["out"]:
                shown = (f"{geometric_mean(ratios[name]):.3f} ({max(ratios[name]):.3f})" for name in tensors)
                rows.setdefault(heading(environment), []).append([suite, dtype, str(len(ratios["out"])), *shown])
    header = ["suite", "dtype", "cases", *tensors]
    return "\n\n".join(f"{title}\n\n{table(header, lines)}" for title, lines in rows.items()) or EMPTY


def tried(results: Path) -> str:
    """What was tried on the GPU kernels, by what factor it changed their speed, and what became of it."""
    blocks = []
    header = ["kernel", "what was tried", "expected", "speed", "verdict"]
    for environment, records, _ in load(results, "tried"):
        rows = []
        for record in records:
            faster = 1 if record["unit"] == "TFLOP/s" else -1
            factors = [(after / before) ** faster for before, after in record["cells"].values()]
            speed_up = f"{geometric_mean(factors):.2f}x ({min(factors):.2f}-{max(factors):.2f})"
            rows.append([record["kernel"], record["what"], record["expected"], speed_up, record["verdict"]])
        blocks.append(f"{machine_name(environment)}, bfloat16 unless said otherwise:\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def examples(results: Path) -> str:
    """What examples/record.py found: figures of each example, with torch's attention and with ours."""
    blocks = []
    for environment, records, _ in load(results, "examples"):
        rows = []
        for record in records:
            for figure, values in record["figures"].items():
                form = ".1f" if figure.endswith("%") else ".4f"
                rows.append([record["example"], figure, *(cell(value, form) for value in values)])
        blocks.append(f"{heading(environment)}\n\n{table(['example', 'figure', 'torch', TITLES[OURS]], rows)}")
    return "\n\n".join(blocks)


def plots(results: Path) -> str:
    """The plots that plot.py drew for each machine."""
    links = []
    for suite in ("prefill", "attention"):
        for environment, _, path in load(results, suite):
            for kind in ("speed", "memory"):
                if kind == "speed" or (path.parent / "memory.json").exists():
                    links.append(f"![{kind} on {machine_name(environment)}](docs/plots/{path.parent.name}-{kind}.png)")
    return "\n\n".join(links)


def error_plots(results: Path) -> str:
    """The plots of errors that plot.py drew for each machine, seen from docs."""
    links = []
    for suite in ("prefill", "attention"):
        for environment, _, path in load(results, suite):
            links.append(f"![error on {machine_name(environment)}](plots/{path.parent.name}-error.png)")
    return "\n\n".join(links)


TABLES: dict[str, Callable[[Path], str]] = {
    made.__name__: made
    for made in (
        speedup,
        speed,
        one_token,
        memory,
        longest,
        error,
        gpu_speedup,
        gpu_speed,
        option_costs,
        slower,
        gpu_error,
        gpu_rms_error,
        tried,
        examples,
        plots,
        error_plots,
    )
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
