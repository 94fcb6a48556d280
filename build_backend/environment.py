"""Finds what a build takes from its surroundings: the torch that it is for, its tools and, when CUDA is wanted, nvcc.

As a script: `environment.py torch` prints torch's folder, `environment.py requirements` the packages that are missing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MINIMUM = {"torch": (2, 11), "cmake": (3, 26), "ninja": (1, 10), "pybind11": (2, 13), "setuptools": (77, 0)}
PRINT_TORCH = """
import importlib.util
spec = importlib.util.find_spec("torch")
print(spec.submodule_search_locations[0] if spec else "")
"""
CUDA_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime", "nvidia-nvvm")
# Folders in which front ends make the venv of an isolated build: build-env-* (build), pip-build-env-* (pip),
# pdm-build-env-* (PDM), builds-v0 (uv).
ISOLATED = re.compile(r"^(\w+-)?build-env-|^builds-v\d+$")
DEFAULT_CUDA = "13.0"  # for a torch that was built without CUDA


class BuildError(SystemExit):
    """Ends the build with one line."""

    def __init__(self, message: str) -> None:
        super().__init__(f"flash_attn_ext: {message}")


@functools.cache
def torch_dir() -> Path:
    """The folder of the torch in the environment that is being installed into.

    Build isolation hides that environment's packages, but not its interpreter: pip runs the build with it, and other
    front ends run the build in a venv of their own that records, or has on its PATH, the one that it came from. So
    each of these interpreters is asked, without the isolation's variables, which torch it sees. Outside such a venv
    none but the running one is: the others' torch is not what the package will run with.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    for python in _target_interpreters():
        command = [python, "-E", "-c", PRINT_TORCH]
        found = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, check=False).stdout.strip()
        if found:
            return Path(found)
    install = f"{sys.executable} -m pip install '{requirement('torch')}'"
    raise BuildError(f"building needs PyTorch in this environment; run: {install}")


def torch_version(field: str = "__version__") -> str:
    """`__version__` or `cuda` of that torch ("" for a CPU build), read without importing it."""
    text = (torch_dir() / "version.py").read_text()
    found = re.search(rf"^{field}\b[^=]*= *'([^']*)'", text, re.MULTILINE)
    return found.group(1) if found else ""


def check_torch() -> None:
    version = torch_version()
    if _numbers(version) < MINIMUM["torch"]:
        raise BuildError(f"PyTorch {version} in {torch_dir().parent} is too old; needed is '{requirement('torch')}'")


def check() -> None:
    """Everything that a build needs: without isolation nobody has installed its requirements."""
    check_torch()
    if missing := requirements():
        packages = " ".join(f"'{requirement}'" for requirement in missing)
        raise BuildError(f"the build needs {packages}; run: {sys.executable} -m pip install {packages}")


def requirements() -> list[str]:
    """The packages that have to be installed for a build; with FAE_CUDA=1 and no CUDA toolkit nvcc's among them."""
    missing = [requirement(tool) for tool in MINIMUM if tool != "torch" and not usable(tool)]
    if os.environ.get("FAE_CUDA") == "1" and not system_nvcc() and not package_nvcc():
        cuda = torch_version("cuda") or DEFAULT_CUDA
        if int(cuda.split(".")[0]) < 13:
            raise BuildError(f"FAE_CUDA=1 needs the CUDA {cuda} toolkit: nvcc as a package exists from 13.0 on")
        missing += [f"{package}=={cuda}.*" for package in CUDA_PACKAGES]
    return missing


def usable(tool: str) -> bool:
    """Whether the build environment has this tool in a version that the build can use."""
    if tool in ("cmake", "ninja"):
        return program(tool) is not None
    try:
        return _numbers(importlib.metadata.version(tool)) >= MINIMUM[tool]
    except importlib.metadata.PackageNotFoundError:
        return False


def program(tool: str) -> str | None:
    """The first cmake or ninja that works and is new enough, on PATH or beside this interpreter.

    Each is run: old ones may come first, and isolation can leave a Python package's program without its package.
    """
    for folder in [*os.environ.get("PATH", "").split(os.pathsep), str(Path(sys.executable).parent)]:
        candidate = shutil.which(tool, path=folder)
        if candidate:
            version = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
            if version.returncode == 0 and _numbers(version.stdout) >= MINIMUM[tool]:
                return candidate
    return None


def requirement(tool: str) -> str:
    return f"{tool}>={'.'.join(map(str, MINIMUM[tool]))}"


def system_nvcc() -> str | None:
    """nvcc of a CUDA toolkit: CUDACXX, CUDA_HOME or PATH, in this order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return os.environ.get("CUDACXX") or (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def package_nvcc() -> Path | None:
    """nvcc of the nvidia-cuda-nvcc package (nvidia/cu<major>/bin/nvcc), where the build environment has it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            return nvcc
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """(major, minor), the first two numbers of a text."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _target_interpreters() -> Iterator[str]:
    """Interpreters of this Python version whose environment may be the one that is being installed into."""
    yield sys.executable
    if not any(ISOLATED.search(part) for part in Path(sys.prefix).parts):
        return
    config = Path(sys.prefix, "pyvenv.cfg")
    made_by = re.search(r"^command = (.+?) -m venv ", config.read_text(), re.MULTILINE) if config.exists() else None
    if made_by:
        yield made_by.group(1)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if python := shutil.which(name, path=folder):
            yield python


if __name__ == "__main__":
    print({"torch": torch_dir, "requirements": lambda: " ".join(requirements())}[sys.argv[1]]())
