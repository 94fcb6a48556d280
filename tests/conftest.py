"""Devices, instruction-set levels and dtypes: every test that takes `device` runs on each of them.

A build with FAE_EMULATOR=1 adds the GPU kernels on a software model of a thread block, so that they are tested on
machines without a GPU: copies arrive as late as they may, shared memory starts as NaN, lanes must stay together.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import DTYPE_NAMES, DTYPES, SANITIZED
from hypothesis import HealthCheck, settings

import flash_attn_ext
from flash_attn_ext import _C

CPU_LEVELS: tuple[str, ...] = tuple(_C.build_info()["cpu_levels_available"])
ALL_CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
# Their instructions multiply bfloat16 only; everything else at these levels runs the kernels of a level below.
MATRIX_LEVELS = ("avx512_bf16", "amx", "amx_emulated")

EMULATOR = Path(flash_attn_ext.__file__).parent / "libflash_attn_ext_emulator.so"
# By name, the backends that are then enabled: what the first does not take, the next one does.
EMULATED: dict[str, list[str]] = {}
if EMULATOR.exists():
    ctypes.CDLL(str(EMULATOR))
    EMULATED = {"sm80_emulated": ["sm80_emulated"], "sm90_emulated": ["sm90_emulated", "sm80_emulated"]}

# Under the sanitizers one takes several times as long.
EXAMPLES = int(os.environ.get("FAE_TEST_EXAMPLES", "200" if SANITIZED else "2000"))
settings.register_profile(
    "problems",
    max_examples=EXAMPLES,
    # The same problems every time, so that no change fails by the luck of the draw; a number asked for is a search.
    derandomize="FAE_TEST_EXAMPLES" not in os.environ,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("problems")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "cpu: float64, which runs on the CPU only")
    config.addinivalue_line("markers", "one_kernel: compares bits of layouts, some of which sm90 leaves to sm80")
    config.addinivalue_line("markers", "large: takes the emulator minutes, and is left out there")
    config.addinivalue_line("markers", "ranges: about how large numbers become, for which float16 is emulated, too")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests that differ in the device alone beside each other: what they expect is then computed once."""
    first: dict[str, int] = {}

    def place(item: pytest.Item) -> int:
        name, _, parameters = item.nodeid.partition("[")
        if given := getattr(item, "callspec", None):
            parameters = parameters.removeprefix(str(given.params.get("device")))
            parameters = parameters.removeprefix(f"-{DTYPE_NAMES.get(given.params.get('dtype'))}")
        return first.setdefault(f"{name}[{parameters}", len(first))

    items.sort(key=place)


def pytest_report_header() -> str:
    missing = [level for level in ALL_CPU_LEVELS if level not in CPU_LEVELS]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return (
        f"flash_attn_ext: CPU levels {', '.join(CPU_LEVELS)}; not on this machine: {', '.join(missing) or 'none'}; "
        f"GPU: {gpu}; emulated: {', '.join(EMULATED) or 'none'}; {EXAMPLES} drawn problems (FAE_TEST_EXAMPLES)"
    )


def runs(place: str, dtype: torch.dtype, ranges: bool) -> bool:
    """Whether tests that take both run there. What they leave out would be the same code twice, and take minutes."""
    if place.removeprefix("cpu-") in MATRIX_LEVELS:
        return dtype == torch.bfloat16
    if place in EMULATED:
        # float32 on Hopper is sm80's; both 16-bit types share every line but the instruction that multiplies.
        types = (torch.bfloat16, *((torch.float32,) if place == "sm80_emulated" else ()))
        return dtype in types or (ranges and dtype == torch.float16)
    return place.startswith("cpu") or dtype != torch.float64


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with `device` run on each CPU level, on CUDA and emulated; with `dtype` too, in each dtype of the place."""
    if "device" not in metafunc.fixturenames:
        return
    with_dtype = "dtype" in metafunc.fixturenames
    parameters = []
    marked = metafunc.definition.get_closest_marker
    gpus = () if marked("cpu") else ("cuda",) if marked("large") else ("cuda", *EMULATED)
    if marked("one_kernel"):
        gpus = tuple(place for place in gpus if place != "sm90_emulated")
    for place in (*(f"cpu-{level}" for level in CPU_LEVELS), *gpus):
        marks = [pytest.mark.gpu] if place == "cuda" else []
        if not with_dtype:
            parameters.append(pytest.param(place, id=place, marks=marks))
            continue
        for dtype in DTYPES:
            if runs(place, dtype, ranges=marked("ranges") is not None):
                parameters.append(pytest.param(place, dtype, id=f"{place}-{DTYPE_NAMES[dtype]}", marks=marks))
    if with_dtype:
        metafunc.parametrize(("device", "dtype"), parameters, indirect=["device"])
    else:
        metafunc.parametrize("device", parameters, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cpu", with the kernels of the level in the test's id, or "cuda".

    While it is in use, memory that torch hands out holds NaN, so that whatever a kernel leaves unwritten shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what makes torch fill new memory
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        sizes = {"batch": 1, "seqlen_q": 9, "seqlen_k": 9, "heads": 1, "heads_kv": 1, "head_dim": 64, "head_dim_v": 64}
        if not any(entry["accepted"] for entry in _C.explain(device="cuda", dtype="float16", **sizes)):
            pytest.skip("this build has no attention kernels for CUDA")
        chosen = [name for name in os.environ.get("FAE_BACKENDS", "").split(",") if name]
        _C.set_backends(["sm80"] if request.node.get_closest_marker("one_kernel") else chosen)
        yield "cuda"
        _C.set_backends(chosen)
    elif request.param in EMULATED:
        _C.set_backends(EMULATED[request.param])
        yield "cpu"
        _C.set_backends([])
    else:
        _C.set_cpu_level(request.param.removeprefix("cpu-"))
        yield "cpu"
        _C.set_cpu_level("")
    torch.use_deterministic_algorithms(False)
