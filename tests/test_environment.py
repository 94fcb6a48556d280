"""build_backend/environment.py: which torch a build is for, and what is said where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ENVIRONMENT = Path(__file__).parent.parent / "build_backend" / "environment.py"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
MISSING = r"flash_attn_ext: building needs PyTorch in this environment; run: \S+ -m pip install 'torch>=2\.11'"


def make_venv(folder: Path, made_by: Path | None = None) -> Path:
    """An environment without packages, torch among them, that records who made it, or as uv's do not."""
    venv.create(folder, symlinks=True)
    config = folder / "pyvenv.cfg"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("command")]
    config.write_text("\n".join([*lines, *([f"command = {made_by} -m venv {folder}"] if made_by else [])]))
    return folder / "bin" / "python"


def interpreter_with_torch(folder: Path) -> Path:
    """What stands for an interpreter of another environment: asked for its torch, it answers."""
    folder.mkdir()
    (folder / PYTHON).write_text(f"#!/bin/sh\necho {folder}/torch\n")
    (folder / PYTHON).chmod(0o755)
    return folder


def torch_of(python: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """`environment.py torch` run by `python`, with these folders on its PATH."""
    command = [python, ENVIRONMENT, "torch"]
    variables = {"PATH": ":".join(map(str, path))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def assert_one_line(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(MISSING, line)


def test_missing_torch_is_said_in_one_line(tmp_path: Path) -> None:
    assert_one_line(torch_of(make_venv(tmp_path / "venv")))
    assert_one_line(torch_of(make_venv(tmp_path / "build-env-x")))


def test_a_plain_venv_does_not_take_the_torch_of_another_environment(tmp_path: Path) -> None:
    other = interpreter_with_torch(tmp_path / "other")
    assert_one_line(torch_of(make_venv(tmp_path / "venv"), other))
    assert_one_line(torch_of(make_venv(tmp_path / "another", made_by=other / PYTHON), other))


@pytest.mark.parametrize("folder", ["build-env-k3a", "pip-build-env-k3a", "pdm-build-env-k3a", "builds-v0/.tmpXk3a"])
def test_an_isolated_build_takes_the_torch_of_its_target(tmp_path: Path, folder: str) -> None:
    target = interpreter_with_torch(tmp_path / "target")
    result = torch_of(make_venv(tmp_path / folder), target)
    assert (result.stdout.strip(), result.returncode) == (f"{target}/torch", 0)


def test_an_isolated_build_asks_first_who_made_its_venv(tmp_path: Path) -> None:
    target, other = interpreter_with_torch(tmp_path / "target"), interpreter_with_torch(tmp_path / "other")
    python = make_venv(tmp_path / "build-env-k3a", made_by=target / PYTHON)
    assert torch_of(python, other).stdout.strip() == f"{target}/torch"


def test_the_environments_own_torch_comes_first(tmp_path: Path) -> None:
    python = make_venv(tmp_path / "build-env-k3a")
    own = python.parents[1] / "lib" / PYTHON / "site-packages" / "torch"
    own.mkdir()
    (own / "__init__.py").touch()
    result = torch_of(python, interpreter_with_torch(tmp_path / "other"))
    assert result.stdout.strip() == str(own)
