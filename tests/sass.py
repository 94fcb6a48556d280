"""Reads the machine code of GPU kernels, as cuobjdump prints it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

PRODUCTS = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA)\b")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")


def cuobjdump() -> str | None:
    """The program, on PATH or from its Python package (which needs the one of nvdisasm beside it)."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [str(path.parent) for path in packages.glob("*/bin/cuobjdump")]
    return shutil.which("cuobjdump") or next((shutil.which("cuobjdump", path=folder) for folder in found), None)


def kernels(library: Path, names: Iterable[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name and (address, instruction) of these kernels, for every architecture that the file has code for."""
    program = cuobjdump()
    assert program
    command = [program, "--dump-sass", "--function", ",".join(names), library]
    search = {"PATH": str(Path(program).parent)}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=search).stdout
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = function.partition("\n")
        yield name, [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", body)]


def main_loops(instructions: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Innermost natural loops that have matrix products: what can be on the way from a loop's head back to it.

    Not everything between the two addresses: compilers put code of others, and what seldom runs, anywhere.
    """
    index = {at: i for i, (at, _) in enumerate(instructions)}
    before: list[list[int]] = [[] for _ in instructions]
    back: dict[int, list[int]] = {}  # from heads to the branches that go back to them
    for i, (_, what) in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what)
        target = index.get(int(branch[1], 16)) if branch else None
        if target is not None:
            before[target].append(i)
            if target <= i:
                back.setdefault(target, []).append(i)
        ends = re.match(r"(BRA|BRX|EXIT|RET)\b(?!.*\bU?P\d)", what)
        if not ends and i + 1 < len(instructions):
            before[i + 1].append(i)

    loops = []
    for head, branches in back.items():
        body, reached = {head}, list(branches)
        while reached:
            if (i := reached.pop()) not in body:
                body.add(i)
                reached += before[i]
        if any(PRODUCTS.search(instructions[i][1]) for i in body):
            loops.append(body)
    for body in loops:
        if not any(other < body for other in loops):
            yield [instructions[i][1] for i in sorted(body)]
