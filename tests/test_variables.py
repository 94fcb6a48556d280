"""FAE_CPU_LEVEL and FAE_BACKENDS, which a process reads once: every test starts one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ALL_CPU_LEVELS, CPU_LEVELS

BEST = [level for level in ALL_CPU_LEVELS if level in CPU_LEVELS and level != "amx_emulated"][-1]
SCRIPT = """
import torch, flash_attn_ext
q = torch.arange(80.0).sin().view(1, 5, 2, 8)
assert (flash_attn_ext.attention(q, q, q) - flash_attn_ext.reference.attention(q, q, q)).abs().max() < 1e-6
print(flash_attn_ext._C.build_info()["cpu_level"], flash_attn_ext._C.backends(), flash_attn_ext.explain(q, q, q))
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})


@pytest.mark.parametrize("level", ALL_CPU_LEVELS)
def test_cpu_level_is_capped(level: str) -> None:
    """At what is asked for; at the machine's best where that is less. It is what runs, and right."""
    found = run("-c", SCRIPT, FAE_CPU_LEVEL=level)
    expected = level if level in CPU_LEVELS else BEST
    assert found.stdout.startswith(f"{expected} []"), found.stderr
    assert f", {expected}" in found.stdout


def test_a_wrong_cpu_level_is_said_on_import() -> None:
    found = run("-c", "import flash_attn_ext", FAE_CPU_LEVEL="sse9")
    assert found.returncode == 1
    accepted = ", ".join(CPU_LEVELS)
    message = f"FAE_CPU_LEVEL must be one of {accepted} on this machine, got 'sse9'"
    assert found.stderr.splitlines()[-1] == f"ImportError: flash_attn_ext cannot start: {message}"


def test_backends_are_limited() -> None:
    found = run("-c", SCRIPT, FAE_BACKENDS=",cpu,")
    assert found.stdout.startswith(f"{BEST} ['cpu'] cpu: "), found.stderr


def test_a_wrong_backend_is_said() -> None:
    message = "FAE_BACKENDS must name backends that are loaded ("
    call = run("-c", SCRIPT, FAE_BACKENDS="cpu,abacus")
    assert call.returncode == 1
    assert call.stderr.splitlines()[-1].startswith(f"ValueError: {message}")
    assert call.stderr.endswith("), got 'abacus'\n")
    info = run("-m", "flash_attn_ext", "info", FAE_BACKENDS="abacus")
    assert (info.returncode, info.stderr) == (0, "")
    assert f"backends             {message}" in info.stdout
    explained = run("-m", "flash_attn_ext", "explain", FAE_BACKENDS="abacus")
    assert explained.returncode == 2
    assert explained.stderr.startswith(message)
