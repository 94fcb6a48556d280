"""Reads the machine code of GPU kernels, as cuobjdump prints it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PRODUCTS = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA)\b")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")


def cuobjdump() -> str | None:
    """The program, on PATH or from its Python package (which needs the one of nvdisasm beside it)."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [str(path.parent) for path in packages.glob("*/bin/cuobjdump")]
    return shutil.which("cuobjdump") or next((shutil.which("cuobjdump", path=folder) for folder in found), None)


def kernels(library: Path) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name and (address, instruction) of every kernel of every architecture in the file."""
    program = cuobjdump()
    assert program
    search = {"PATH": str(Path(program).parent)}
    text = subprocess.run([program, "-sass", library], capture_output=True, text=True, check=True, env=search).stdout
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = function.partition("\n")
        yield name, [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", body)]


def main_loops(instructions: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Innermost loops that have matrix products: from where a branch goes back to, up to it."""
    ranges = []
    for at, what in instructions:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what)
        if target and int(target[1], 16) <= at:
            ranges.append((int(target[1], 16), at))
    loops = [
        (first, last)
        for first, last in ranges
        if any(first <= at <= last and PRODUCTS.search(what) for at, what in instructions)
    ]
    for first, last in loops:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops):
            yield [what for at, what in instructions if first <= at <= last]
