"""Runs every example and keeps its figures for the page about them, docs/examples.md.

    python examples/record.py && python benchmarks/tables.py

Writes benchmarks/results/<machine>/examples.json, and the nanoGPT's plot into docs/plots. Takes about ten minutes of
two cores, and a C++ compiler.
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import machine  # noqa: E402

# By name: with torch's attention, and with ours.
Figures = Mapping[str, Sequence[float | None]]


def main_of(path: str) -> Callable[[list[str]], Any]:
    main: Callable[[list[str]], Any] = runpy.run_path(str(ROOT / "examples" / path), run_name=path)["main"]
    return main


def written(path: str, folder: Path, *arguments: str) -> Figures:
    """Those that the example writes by itself."""
    if main_of(path)([*arguments, "--json", str(folder / "figures.json")]):
        raise RuntimeError(f"{path} failed")
    figures: Figures = json.loads((folder / "figures.json").read_text())
    return figures


def nanogpt(folder: Path) -> Figures:
    figures = written("nanogpt/train.py", folder, "--output", str(folder))
    shutil.copy(folder / "train.png", ROOT / "docs" / "plots" / "nanogpt-loss.png")
    return figures


def transformers(_: Path) -> Figures:
    main = main_of("transformers/finetune.py")
    figures: dict[str, list[float]] = {"right function first, before, %": [], "right function first, after, %": []}
    for name in ("eager", "fa_ext"):
        for found, share in zip(figures.values(), main(["--attention", name]), strict=True):
            found.append(100 * share)
    return figures


def vit(folder: Path) -> Figures:
    return written("vit/train.py", folder)


def cpp(folder: Path) -> Figures:
    prefix = subprocess.check_output([sys.executable, "-m", "flash_attn_ext", "info", "--cmake"], text=True).strip()
    subprocess.check_call(["cmake", "-S", ROOT / "examples/cpp", "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}"])
    subprocess.check_call(["cmake", "--build", folder])
    lines = subprocess.check_output([folder / "train", ROOT / "CONTRIBUTING.md"], text=True).splitlines()
    return {f"loss, step {step}": (None, float(lines[step].split()[-1])) for step in (0, len(lines) - 1)}


def main() -> int:
    environment = machine.environment("cpu") | {"date": machine.today()}
    records = []
    for example in (nanogpt, transformers, vit, cpp):
        with tempfile.TemporaryDirectory() as folder:
            records.append({"example": example.__name__, "figures": example(Path(folder))})
    path = ROOT / "benchmarks" / "results" / machine.slug(environment) / "examples.json"
    path.write_text(json.dumps({"environment": environment, "records": records}, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
