"""Calls CMake, which describes the whole build (CMakeLists.txt); everything else is in pyproject.toml.

Environment: FAE_CUDA=0/1 (without it CUDA is built where nvcc is found), TORCH_CUDA_ARCH_LIST, MAX_JOBS,
FAE_EMULATOR=1, FAE_SANITIZE=1, FAE_WERROR=1.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import environment  # noqa: E402

PACKAGE = "flash_attn_ext"
OPTIONS = {"FAE_CUDA": "AUTO", "FAE_EMULATOR": "OFF", "FAE_SANITIZE": "OFF", "FAE_WERROR": "OFF"}


class CleanBuild(build):
    def run(self) -> None:
        # The staging folder outlives a build; a wheel must not pick up modules that have been deleted since.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        environment.check()
        options = {name: os.environ.get(name) or default for name, default in OPTIONS.items()}
        # One lasting build folder for each thing that changes every object file: only changed sources are recompiled.
        kind = "sanitize" if options["FAE_SANITIZE"] != "OFF" else "release"
        build_dir = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-torch-{environment.torch_version()}"
        destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        variables = dict(os.environ)

        cmake = environment.program("cmake")
        configure = [cmake, "-G", "Ninja", "-S", ROOT, "-B", build_dir]
        # Isolated builds have their tools in a new place each time, so these are passed every time.
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={environment.program('ninja')}"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        nvcc = environment.package_nvcc()
        if nvcc and not environment.system_nvcc() and options["FAE_CUDA"] != "0":
            configure.append("--fresh")
            variables["CUDACXX"] = str(nvcc)
            # The package has its libraries in lib, where its nvcc doesn't look for them.
            variables["LIBRARY_PATH"] = f"{nvcc.parents[1] / 'lib'}{os.pathsep}{variables.get('LIBRARY_PATH', '')}"

        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        for command in (
            configure,
            [cmake, "--build", build_dir, "--parallel", jobs],
            [cmake, "--install", build_dir, "--prefix", destination],
        ):
            try:
                subprocess.run(command, env=variables, check=True)
            except subprocess.CalledProcessError:
                raise environment.BuildError(f"failed: {' '.join(map(str, command))}") from None
        remove_stale_libraries(build_dir, destination / PACKAGE)


def remove_stale_libraries(build_dir: Path, package_dir: Path) -> None:
    """A CUDA library that this build no longer makes would go on being loaded."""
    installed = {Path(line) for line in (build_dir / "install_manifest.txt").read_text().splitlines()}
    for library in package_dir.glob("lib*.so"):
        if library not in installed:
            library.unlink()


setup(
    ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
