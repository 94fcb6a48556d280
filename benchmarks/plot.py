"""Draws speed, memory and error from the result files into docs/plots/<machine>-*.png.

python benchmarks/plot.py
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from tables import DIRECTIONS, OURS, RESULTS, ROOT, gflops, groups, load, machine_name, measured

PLOTS = ROOT / "docs" / "plots"
COLOURS = {
    "flash_attn_ext": "#d1495b",
    "sdpa_flash": "#30638e",
    "sdpa_cudnn": "#2a9d8f",
    "sdpa_efficient": "#7b6fb0",
    "sdpa_math": "#8fb8de",
    "torch_varlen": "#1b4965",
    "flex_attention": "#e9a23b",
    "softmax": "#a7a7a7",
    "fa2": "#6a994e",
    "fa2_deterministic": "#a7c957",
    "fa3": "#386641",
    "fa3_deterministic": "#84a98c",
    "fa4": "#9c6644",
    "fa4_deterministic": "#ddb892",
    "xformers": "#5c5c5c",
}
Record = dict[str, Any]


def bars(axes: Axes, records: list[Record], direction: str) -> None:
    """GFLOP/s of each candidate for each case; a dot over each group is the machine's matrix product."""
    titles = measured(records)
    width = 0.8 / len(titles)
    for index, (candidate, title) in enumerate(titles.items()):
        heights = [gflops(record, candidate, direction) or 0.0 for record in records]
        places = [place + index * width for place in range(len(records))]
        axes.bar(places, heights, width, label=title, color=COLOURS[candidate])
    middle = [place + (len(titles) - 1) / 2 * width for place in range(len(records))]
    axes.plot(middle, [r["gemm_gflops"] for r in records], "k_", markersize=14, label="matrix product")
    axes.set_xticks(
        middle, [record["name"].split(" ", 1)[1] for record in records], rotation=40, ha="right", fontsize=7
    )
    axes.set_ylabel("GFLOP/s")
    axes.spines[["top", "right"]].set_visible(False)


def draw_speed(environment: Record, records: list[Record], path: Path) -> None:
    """One row per dtype and number of threads; forward on the left, backward on the right."""
    rows = list(groups(records))
    figure, grid = plt.subplots(len(rows), 2, figsize=(13, 3.4 * len(rows)), squeeze=False, layout="constrained")
    for line, (dtype, threads, group) in zip(grid, rows, strict=True):
        for axes, direction in zip(line, DIRECTIONS, strict=True):
            bars(axes, group, direction)
            axes.set_title(f"{direction}, {dtype}, {threads} thread{'s' if threads > 1 else ''}", fontsize=9)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=5, frameon=False, fontsize=8
    )
    figure.suptitle(machine_name(environment), x=0.3)
    save(figure, path)


def draw_gpu_speed(environment: Record, records: list[Record], path: Path) -> None:
    """TFLOP/s against sequence length: a column per head dimension and mask, forward above backward."""
    panels: dict[tuple[int, bool], list[Record]] = {}
    for record in records:
        panels.setdefault((record["case"]["head_dim"], record["case"]["causal"]), []).append(record)
    columns = sorted(panels)
    size = (3.4 * len(columns) + 2, 6.5)
    figure, grid = plt.subplots(2, len(columns), figsize=size, squeeze=False, sharey="row", layout="constrained")
    for line, direction in zip(grid, DIRECTIONS, strict=True):
        for axes, key in zip(line, columns, strict=True):
            for candidate, title in measured(records).items():
                found = [(r["case"]["seqlen_k"], gflops(r, candidate, direction)) for r in panels[key]]
                points = sorted((seqlen, speed / 1e3) for seqlen, speed in found if speed is not None)
                ours = {"linewidth": 2.5, "zorder": 3} if candidate == OURS else {}
                axes.plot(*(zip(*points, strict=True) if points else ([], [])), "o-", markersize=3, label=title)
                axes.lines[-1].set(color=COLOURS[candidate], **ours)
            seqlens = sorted(record["case"]["seqlen_k"] for record in panels[key])
            axes.set_xscale("log", base=2)
            axes.set_xticks(seqlens, map(str, seqlens), fontsize=7)
            axes.set_title(f"{direction}, D {key[0]}, {'causal' if key[1] else 'full'}", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("TFLOP/s")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{machine_name(environment)}, {records[0]['case']['dtype']}")
    save(figure, path)


def draw_memory(environment: Record, records: list[Record], path: Path) -> None:
    """Extra peak memory against sequence length, most threads, one panel per dtype."""
    most = max(record["threads"] for record in records)
    panels = [(dtype, group) for dtype, threads, group in groups(records) if threads == most]
    figure, grid = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axes, (dtype, group) in zip(grid[0], panels, strict=True):
        for candidate, title in measured(group).items():
            found = [(r["case"]["seqlen_k"], r["candidates"].get(candidate, {}).get("extra_mib")) for r in group]
            points = [(seqlen, mib) for seqlen, mib in found if mib is not None]
            if points:
                axes.loglog(*zip(*points, strict=True), "o-", label=title, color=COLOURS[candidate])
        seqlens = [record["case"]["seqlen_k"] for record in group]
        axes.set_xticks(seqlens, map(str, seqlens))
        axes.minorticks_off()
        title = dtype if "gpu" in environment else f"{dtype}, {most} threads"
        axes.set(title=title, xlabel="sequence length", ylabel="MiB beyond inputs and results")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Peak memory of forward + backward, {machine_name(environment)}")
    save(figure, path)


def draw_error(environment: Record, records: list[Record], path: Path) -> None:
    """Largest error against float64 of each candidate: one point per case."""
    dtypes = list(dict.fromkeys(record["case"]["dtype"] for record in records))
    tensors = ("out", "dq", "dk", "dv")
    figure, grid = plt.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4), squeeze=False, layout="constrained")
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        shift = min(0.15, 0.6 / len(measured(records)))
        for index, (candidate, title) in enumerate(measured(records).items()):
            errors = [r["candidates"].get(candidate, {}).get("error") for r in records if r["case"]["dtype"] == dtype]
            points = [(place + shift * index, e[name]) for e in errors if e for place, name in enumerate(tensors)]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o", markersize=4, alpha=0.6, label=title, color=COLOURS[candidate]
                )
        axes.set_yscale("log")
        axes.set_xticks([place + 0.225 for place in range(len(tensors))], tensors)
        axes.set(title=dtype, ylabel="largest error against float64")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(machine_name(environment))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(path)


def main(results: Path = RESULTS, output: Path = PLOTS) -> int:
    for suite, name, draw in (
        ("attention", "speed", draw_speed),
        ("memory", "memory", draw_memory),
        ("attention", "error", draw_error),
        ("prefill", "speed", draw_gpu_speed),
        ("prefill", "error", draw_error),
    ):
        for environment, records, path in load(results, suite):
            draw(environment, records, output / f"{path.parent.name}-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
