"""Whole problems, drawn: every option in combination, on every CPU level that the machine has.

conftest.py sets how many (FAE_TEST_EXAMPLES asks for more). A failure prints the smallest case that shows it; paste its
repr into test_attention.py to keep it.
"""

from __future__ import annotations

import pytest
import torch
from cases import BIAS_VALUES, DOUT_LAYOUTS, DTYPES, LAYOUTS, VALUES, Case, check
from conftest import EXAMPLES
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from flash_attn_ext import _C

# Lengths about which tiles begin and end, and any others.
EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257)
LENGTHS = st.integers(0, 40) | st.sampled_from(EDGES) | st.integers(0, 300)
HEAD_DIMS = st.sampled_from((1, 3, 8, 16, 17, 32, 64)) | st.integers(1, 140) | st.sampled_from((192, 256, 300, 512))


@st.composite
def problems(draw: DrawFn) -> Case:
    """A case with few options on average, and any number at most."""

    def sometimes(one_in: int) -> bool:
        return draw(st.integers(0, one_in - 1)) == one_in - 1

    def pattern() -> str:
        return "".join(letter if draw(st.booleans()) else "1" for letter in "bhqk")

    batch = 0 if sometimes(40) else draw(st.integers(1, 3))
    heads_kv = 0 if sometimes(40) else draw(st.integers(1, 3))
    options: dict[str, object] = {
        "batch": batch,
        "heads_kv": heads_kv,
        "heads": heads_kv * draw(st.sampled_from((1, 1, 2, 3))),
        "seqlen_q": draw(LENGTHS),
        "seqlen_k": draw(LENGTHS),
        "head_dim": draw(HEAD_DIMS),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 99)),
        "lse_grad": draw(st.booleans()),
    }
    if sometimes(3):
        options["head_dim_v"] = draw(HEAD_DIMS)
    longest_q, longest_k = [options["seqlen_q"]] * batch, [options["seqlen_k"]] * batch
    if sometimes(3):
        longest_q, longest_k = (draw(st.lists(LENGTHS, min_size=batch, max_size=batch)) for _ in range(2))
        options |= {"lengths_q": tuple(longest_q), "lengths_k": tuple(longest_k), "tail": draw(st.integers(0, 2))}
    for name, longest in (("used_q", longest_q), ("used_k", longest_k)):
        if sometimes(5):
            options[name] = tuple(draw(st.integers(0, n)) for n in longest)
    if sometimes(2):
        options["window_right"] = 0
    elif sometimes(3):
        options["window_right"] = draw(st.integers(-20, 80))
    if sometimes(3):
        options["window_left"] = draw(st.integers(-20, 80))
    if sometimes(4):
        options["scale"] = draw(st.sampled_from((0.0, 1.0, -0.5)) | st.floats(-1, 1))
    if sometimes(4):
        options["softcap"] = draw(st.floats(0.5, 50))
    if sometimes(4):
        options["alibi"] = draw(st.sampled_from(("h", "bh")))
    if sometimes(3):
        options |= {
            "bias": pattern(),
            "bias_values": draw(st.sampled_from(BIAS_VALUES)),
            "bias_float32": draw(st.booleans()),
            "bias_grad": not sometimes(4),
        }
    if sometimes(4):
        options |= {"mask": pattern(), "mask_density": draw(st.sampled_from((0.0, 0.05, 0.5, 0.95)))}
    if sometimes(4):
        options["sinks"] = True
    if sometimes(4):
        options["dropout_p"] = draw(st.sampled_from((0.1, 0.5, 0.9)))
    if sometimes(3):
        options["values"] = draw(st.sampled_from(VALUES))
    options["layout"] = draw(st.sampled_from(("contiguous", *LAYOUTS)))
    options["dout_layout"] = draw(st.sampled_from(("contiguous", *DOUT_LAYOUTS)))
    return Case(**options)  # type: ignore[arg-type]


# Out of all levels, so that every machine draws the same problems; those that a machine lacks fall on one that it has.
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
AVAILABLE = _C.build_info()["cpu_levels_available"]


PARTS = 4  # for processes that run in parallel


@pytest.mark.parametrize("part", range(PARTS))
def test_drawn_problem(part: int) -> None:
    # One more, because all parts begin with the simplest problem.
    @settings(max_examples=EXAMPLES // PARTS + 1)
    @given(case=problems(), level=st.sampled_from(LEVELS), threads=st.sampled_from((1, 2)))
    def drawn(case: Case, level: str, threads: int) -> None:
        level = level if level in AVAILABLE else AVAILABLE[LEVELS.index(level) % len(AVAILABLE)]
        note(f"_C.set_cpu_level({level!r}); torch.set_num_threads({threads})")
        before = torch.get_num_threads()
        _C.set_cpu_level(level)
        torch.set_num_threads(threads)
        try:
            check(case)
        finally:
            torch.set_num_threads(before)
            _C.set_cpu_level("")

    if settings.default.derandomize:
        drawn = seed(part)(drawn)
    drawn()
