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
from tables import DIRECTIONS, RESULTS, ROOT, TITLES, gflops, groups, load, machine_name, measured

PLOTS = ROOT / "docs" / "plots"
COLOURS = dict(zip(TITLES, ("#d1495b", "#30638e", "#8fb8de", "#a7a7a7"), strict=True))
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
        axes.set(title=f"{dtype}, {most} threads", xlabel="sequence length", ylabel="MiB beyond inputs and results")
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
        for index, (candidate, title) in enumerate(measured(records).items()):
            errors = [r["candidates"].get(candidate, {}).get("error") for r in records if r["case"]["dtype"] == dtype]
            points = [(place + 0.15 * index, e[name]) for e in errors if e for place, name in enumerate(tensors)]
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
    ):
        for environment, records, path in load(results, suite):
            draw(environment, records, output / f"{path.parent.name}-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
