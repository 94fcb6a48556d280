"""Reads the machine code of GPU kernels, as nvdisasm prints it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

PRODUCTS = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA)\b")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")


def programs() -> dict[str, str] | None:
    """cuobjdump and nvdisasm, on PATH or from their Python packages."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders = [str(path) for path in packages.glob("*/bin")]
    found = {}
    for name in ("cuobjdump", "nvdisasm"):
        places = (shutil.which(name), *(shutil.which(name, path=folder) for folder in folders))
        if not (program := next(filter(None, places), None)):
            return None
        found[name] = program
    return found


def kernels(library: Path, names: Collection[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name and (address, instruction) of these kernels, for every architecture that the file has code for.

    `cuobjdump --dump-sass` takes three times as long: it disassembles all others too.
    """
    found = programs()
    assert found
    with tempfile.TemporaryDirectory() as folder:
        _output(found["cuobjdump"], "--extract-elf", "all", library, folder=folder)
        for elf in sorted(Path(folder).iterdir()):
            symbols = re.findall(r"^ *(\d+):.*\bFUNC\b.* (\S+)$", _output("readelf", "-sW", elf), re.MULTILINE)
            wanted = [index for index, name in symbols if name in names]
            if wanted:
                yield from _functions(_output(found["nvdisasm"], "-c", "-fun", ",".join(wanted), elf))


def _output(*command: object, folder: str | None = None) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, cwd=folder).stdout


def _functions(text: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Of nvdisasm's text, which has labels where branches go to: they get their addresses."""
    line = re.compile(r"^(?:(\.L_\w+):|\s+/\*([0-9a-f]{4,})\*/\s+(.*?);)", re.MULTILINE)
    for function in re.split(r"^\t\.section\t\.text\.", text, flags=re.MULTILINE)[1:]:
        labels: dict[str, str] = {}
        waiting: list[str] = []
        instructions: list[tuple[int, str]] = []
        for label, at, what in line.findall(function):
            if label:
                waiting.append(label)
                continue
            labels |= dict.fromkeys(waiting, hex(int(at, 16)))
            waiting = []
            instructions.append((int(at, 16), what))

        def address(label: re.Match[str], labels: dict[str, str] = labels) -> str:
            return labels.get(label[1], label[0])

        name = re.split(r"[,\s]", function, maxsplit=1)[0]
        yield name, [(at, re.sub(r"`\((\.L_\w+)\)", address, what)) for at, what in instructions]


def main_loops(instructions: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Innermost natural loops that have matrix products: what can be on the way from a loop's head back to it.

    Not everything between the two addresses: compilers put code of others, and what seldom runs, anywhere. Where
    a kernel has products of warpgroups, a warp's are such code.
    """
    index = {at: i for i, (at, _) in enumerate(instructions)}
    before: list[list[int]] = [[] for _ in instructions]
    back: list[tuple[int, int]] = []  # heads, and branches that go back to them: of two loops, perhaps
    for i, (_, what) in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what) if "BRA" in what else None
        target = index.get(int(branch[1], 16)) if branch else None
        if target is not None:
            before[target].append(i)
            if target <= i:
                back.append((target, i))
        ends = re.match(r"(BRA|BRX|EXIT|RET)\b(?!.*\bU?P\d)", what)
        if not ends and i + 1 < len(instructions):
            before[i + 1].append(i)

    products = re.compile("HGMMA") if any("HGMMA" in what for _, what in instructions) else PRODUCTS
    loops = set()
    for head, branch in back:
        body, reached = {head}, [branch]
        while reached:
            if (i := reached.pop()) not in body:
                body.add(i)
                reached += before[i]
        if any(products.search(instructions[i][1]) for i in body):
            loops.add(frozenset(body))
    for body in loops:
        if not any(other < body for other in loops):
            yield [instructions[i][1] for i in sorted(body)]
