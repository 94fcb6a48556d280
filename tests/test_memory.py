"""What attention allocates: nothing of the size of the scores, and nothing that it reads before writing it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import SANITIZED

TESTS = Path(__file__).parent
MIB = 2**20
BUDGET = 64 * MIB  # whatever the length
BUDGET_PER_THREAD = 16 * MIB


def run(script: str, **environment: str) -> str:
    """Runs a script in a process of its own and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


PEAK = """
import torch, flash_attn_ext

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def step(q, k, v, dout):
    out, lse = flash_attn_ext.attention(q, k, v, causal={causal}, window_size={window}, return_lse=True)
    return out, lse, *torch.autograd.grad(out, (q, k, v), dout)

torch.set_num_threads({threads})
dtype = torch.{dtype}
shape, shape_kv = (1, 16384, {heads}, 64), (1, 16384, {heads_kv}, 64)
small = [torch.randn(1, 64, 1, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
step(*small, torch.randn(1, 64, 1, 64, dtype=dtype))  # libraries loaded, threads started
q, k, v = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, shape_kv, shape_kv))
dout = torch.randn(shape).to(dtype)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
results = step(q, k, v, dout)
print(status("VmHWM") - before - sum(t.numel() * t.element_size() for t in results))
"""


has_peaks = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")


def check_peak(threads: int, **problem: object) -> None:
    used = int(run(PEAK.format(threads=threads, **problem)))
    assert used <= BUDGET + BUDGET_PER_THREAD * threads, f"{used / MIB:.0f} MiB"


@pytest.mark.slow
@has_peaks
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory_of_the_size_of_the_scores(dtype: str, heads: int, threads: int) -> None:
    """Length 16384, forward and backward, beyond inputs, outputs and gradients; scores alone would be 1 GiB a head."""
    check_peak(threads, dtype=dtype, heads=heads, heads_kv=heads, causal=heads > 1, window=(-1, -1))


@has_peaks
@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_memory_for_every_head_that_shares_keys(dtype: str, heads: int) -> None:
    """The same budget: partial sums of all heads at once would take 4 MiB each, and as many of dK and dV 8."""
    check_peak(1, dtype=dtype, heads=heads, heads_kv=1, causal=True, window=(64, 0))


PACKED_PEAK = """
import torch, flash_attn_ext

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()

torch.set_num_threads(1)
dtype, long, short = torch.{dtype}, 131072, 1023
q, k = torch.randn(short + 1, 8, 64).to(dtype), torch.randn(short + long, 1, 64).to(dtype)
starts_q, starts_k = starts([1] * (short + 1)), starts([1] * short + [long])
flash_attn_ext.attention_varlen(q[:2], k[:2], k[:2], starts_q[:3], starts_k[:3])  # libraries loaded
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
flash_attn_ext.attention_varlen(q, k, k, starts_q, starts_k)
print(status("VmHWM") - before)
"""


@has_peaks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_memory_of_the_longest_history_for_every_sequence(dtype: str) -> None:
    """One token for each of 1024 packed sequences, of which one is long. With partial results for as many keys of each,
    that was 1.5 GiB."""
    used = int(run(PACKED_PEAK.format(dtype=dtype)))
    assert used <= BUDGET, f"{used / MIB:.0f} MiB"


UNUSED_ROWS = """
import torch, flash_attn_ext

def address_space():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmPeak"))

rows, keys = 2_000_000, 4096
q, k = (torch.zeros(n, 1, 16, requires_grad=True) for n in (rows, keys))
starts_q, starts_k, used = (torch.tensor(x, dtype=torch.int32) for x in ([0, rows], [0, keys], [64]))
out = flash_attn_ext.attention_varlen(q, k, k, starts_q, starts_k, seqused_q=used)
dout, before = torch.zeros_like(out), address_space()
out.backward(dout)
print(address_space() - before)
"""


@has_peaks
def test_room_for_partial_sums_counts_rows_that_are_not_used() -> None:
    """The gradient of the queries, 122 MiB, and a partial sum of it; one for each of 16 chunks was 2.1 GiB."""
    assert int(run(UNUSED_ROWS)) <= 512 * MIB


# Every block from the allocator, not only torch's tensors, starts as bytes 0xff: NaN in every float type.
POISON = """
#include <stddef.h>
#include <string.h>
void* __libc_malloc(size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t n) { void* p = __libc_malloc(n); return p ? memset(p, 0xff, n) : p; }
void* memalign(size_t a, size_t n) { void* p = __libc_memalign(a, n); return p ? memset(p, 0xff, n) : p; }
void* aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) { return (*p = memalign(a, n)) ? 0 : 12; }
"""

CHECKS = """
import torch
from cases import Case, check
from flash_attn_ext import _C
assert torch.empty(1000).isnan().all()
for level in _C.build_info()["cpu_levels_available"]:
    _C.set_cpu_level(level)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        case = Case(seqlen_q=50, seqlen_k=90, head_dim=40, dtype=dtype)
        check(case)
        check(case.but(window_right=0, bias="1h1k", sinks=True, head_dim_v=17, softcap=3.0))
        check(case.but(seqlen_q=1, seqlen_k=700))
        check(case.but(lengths_q=(3, 70), lengths_k=(80, 9), tail=2, bias="b1qk", mask="bhqk", dropout_p=0.2))
        check(case.but(used_q=(50, 0), used_k=(33, 90), window_left=20, alibi="h"))
print("all right")
"""


@pytest.mark.skipif(shutil.which("cc") is None or not sys.platform.startswith("linux"), reason="needs cc and glibc")
@pytest.mark.skipif(SANITIZED, reason="the sanitizer replaces the allocator, as this test does")
def test_nothing_is_read_before_it_is_written(tmp_path: Path) -> None:
    """Results do not change where all fresh memory, scratch of the kernels included, holds NaN."""
    source, library = tmp_path / "poison.c", tmp_path / "poison.so"
    source.write_text(POISON)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, source], check=True)
    assert "all right" in run(CHECKS, LD_PRELOAD=str(library))


UNCHANGED = """
import torch
from cases import Case
def rss():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
case = Case(batch=2, seqlen_q=300, seqlen_k=300, bias="bhqk", sinks=True, dropout_p=0.1)
inputs = case.make()
for _ in range(20):
    case.run_ours(inputs)
before = rss()
for _ in range(200):
    case.run_ours(inputs)
print((rss() - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps freed memory to catch its use")
def test_no_leak() -> None:
    """A leak of one call's results would take 570 MB in 200 calls (2.9 MB of bias gradient alone each); the heap's own
    fragments take two or three."""
    assert int(run(UNCHANGED)) < 20 * MIB
