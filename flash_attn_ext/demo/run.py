"""The demo command."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TITLES = {
    "parity": "1. The same numbers in less memory",
    "train": "2. A GPT trained twice",
    "pretrained": "3. A pretrained transformer with its attention replaced",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts, prints as it goes and writes plots; returns 1 if a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m flash_attn_ext demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the plots (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds instead of minutes")
    parser.add_argument("--parts", default=",".join(TITLES), help="comma-separated (%(default)s)")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in TITLES]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(TITLES)}")
    try:
        from rich.console import Console

        from . import parity, pretrained, train
        from .common import Demo
    except ModuleNotFoundError as missing:
        print(f"The demo needs {missing.name}: pip install 'flash_attn_ext[demo]'", file=sys.stderr)
        return 2

    options.output.mkdir(parents=True, exist_ok=True)
    demo = Demo(Console(), options.output, options.quick)
    start = time.perf_counter()
    for part in parts:
        demo.console.rule(TITLES[part], align="left")
        {"parity": parity, "train": train, "pretrained": pretrained}[part].run(demo)
    demo.console.rule()
    demo.console.print(f"Took {time.perf_counter() - start:.0f} s. Plots are in {options.output.resolve()}")
    for claim in demo.failures:
        demo.console.print(f"[bold red]FAILED[/]  {claim}")
    return 1 if demo.failures else 0
