"""Where and with what a measurement was made: written into every result file."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from flash_attn_ext import _C

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "flash_attn_ext", ":!flash_attn_ext/demo", "CMakeLists.txt", "cmake", "benchmarks/*.py")


def cpu_model() -> str:
    """As lscpu shows it; the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Last commit that changed what is measured or how, marked where the files differ from it.

    FAE_COMMIT names it for a copy without git.
    """
    if named := os.environ.get("FAE_COMMIT"):
        return named
    try:
        last = git("log", "-1", "--format=%h", "--abbrev=12")
        return last + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    command = ["git", *arguments, "--", *SOURCES]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def nvidia_smi(query: str) -> list[str]:
    """Command that asks for values of the GPU in use."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]


def driver() -> str:
    try:
        return subprocess.run(nvidia_smi("driver_version"), capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class GPUState:
    """Clock and power while the GPU goes on working: asks when made, and reads the answer later."""

    def __init__(self) -> None:
        try:
            command = nvidia_smi("clocks.sm,power.draw")
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self._process = None

    def read(self) -> dict[str, float]:
        """Empty where the system does not tell."""
        if self._process is None:
            return {}
        try:
            answer, _ = self._process.communicate(timeout=10)
            clock, power = answer.split(",")
            return {"sm_mhz": float(clock), "power_w": float(power)}
        except (subprocess.TimeoutExpired, ValueError):
            self._process.kill()
            return {}


def package_versions() -> dict[str, str]:
    """Of the packages whose kernels or compilers take part, as far as they are installed."""
    versions = {}
    for package in ("triton", "flash_attn", "flash_attn_3", "flash_attn_4", "xformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def environment(device: str) -> dict[str, str | int]:
    build = _C.build_info()
    described: dict[str, str | int] = {
        "commit": commit(),
        "flash_attn_ext": build["version"],
        "compiler": build["compiler"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": cpu_model(),
        "cpu_level": build["cpu_level"],
        "cores": os.cpu_count() or 1,
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
        described["driver"] = driver()
        described["cuda"] = torch.version.cuda or ""
        described["cudnn"] = torch.backends.cudnn.version() or ""
        described |= package_versions()
    return described


def slug(described: dict[str, str | int]) -> str:
    """Folder name for the results: the device, and for a CPU the instruction set that our kernels use."""
    name = str(described["gpu"]) if "gpu" in described else f"{described['cpu']} {described['cpu_level']}"
    text = re.sub(r"\(r\)|\(tm\)|@.*ghz|processor|cpu", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")
