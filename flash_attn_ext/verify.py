"""`python -m flash_attn_ext verify`: does this install compute right on every device of this machine?

Outputs and gradients of every option against the float64 specification in reference.py, by its error rule with twice
its factors: torch's own largest error is a single draw that differs between machines, and a broken build is off by
orders of magnitude. The test suite looks closer; this takes seconds and needs nothing but the installed package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _C, reference
from .attention import attention, attention_varlen, merge, softmax
from .explain import explain
from .ops import stats_dtype

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_KV, HEAD_DIM = 2, 130, 150, 4, 2, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is what the others are measured by

Function = Callable[..., Any]
# Name, our function, the specification's (which also takes the dtype to compute in), and the inputs of both.
Case = tuple[str, Function, Function, dict[str, Tensor]]


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    place: str
    name: str
    error: float
    """The largest error of any output or gradient, as a share of what the rule allows: up to 1 passes."""

    @property
    def passed(self) -> bool:
        return self.error <= 1  # not where it is NaN

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.place:14} {self.name:45} error {self.error:.2f} of allowed"


def checks() -> Iterator[Check]:
    """Runs the checks and yields each when it is done: every instruction-set level of the CPU, every CUDA device."""
    for level in _C.build_info()["cpu_levels_available"]:
        if level == "amx_emulated":  # a model for tests on machines without AMX, too slow to be useful here
            continue
        _C.set_cpu_level(level)
        try:
            yield from _checks_on(torch.device("cpu"), f"cpu {level}")
        finally:
            _C.set_cpu_level("")
    for index in range(torch.cuda.device_count() if cuda_ops_loaded() else 0):
        yield from _checks_on(torch.device("cuda", index), f"cuda:{index}")


def cuda_ops_loaded() -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("flash_attn_ext::softmax", "CUDA"))


def _checks_on(device: torch.device, place: str) -> Iterator[Check]:
    for dtype in DTYPES:
        for name, function, oracle, inputs in _cases(device, dtype):
            yield Check(place, f"{name}, {str(dtype).removeprefix('torch.')}", _error(function, oracle, inputs, dtype))


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    q = _normal(device, dtype, BATCH, SEQLEN_Q, HEADS, HEAD_DIM)
    k, v = (_normal(device, dtype, BATCH, SEQLEN_K, HEADS_KV, HEAD_DIM, seed=seed) for seed in (1, 2))
    if explain(q, k, v).backend is not None:
        yield from _attention_cases(q, k, v)

    def softmax_oracle(x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.softmax(x.to(dtype), -1)

    def merge_oracle(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, dtype: torch.dtype) -> Any:
        _, lse = reference.merge(out_a, lse_a, out_b, lse_b)
        out, _ = reference.merge(*(x.to(dtype) for x in (out_a, lse_a, out_b, lse_b)))
        return out, lse

    yield "softmax", softmax, softmax_oracle, {"x": _normal(device, dtype, 50, 1000)}
    stats = _normal(device, stats_dtype(dtype), 2, BATCH, HEADS, SEQLEN_Q)
    yield "merge", merge, merge_oracle, {"out_a": q, "lse_a": stats[0], "out_b": q.flip(1), "lse_b": stats[1]}


def _attention_cases(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    device, dtype = q.device, q.dtype

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    dense = {"q": q, "k": k, "v": v}
    mask = _normal(device, dtype, SEQLEN_Q, SEQLEN_K) > -1
    options: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window and softcap": {"window_size": (40, 10), "softcap": 2.0},
        "ALiBi and mask": {"alibi_slopes": torch.linspace(0.1, 0.5, HEADS, device=device), "mask": mask},
        "used lengths": {"causal": True, "seqused_q": integers(100, 130), "seqused_k": integers(150, 90)},
    }
    for name, chosen in options.items():
        yield f"attention, {name}", *_pair(attention, reference.attention, chosen), dense
    sinks = {"sinks": _normal(device, dtype, HEADS)}
    learned = {**dense, "bias": _normal(device, dtype, HEADS, SEQLEN_Q, SEQLEN_K)}
    yield "attention, bias and sinks", *_pair(attention, reference.attention, sinks), learned
    packed = {name: x.flatten(0, 1) for name, x in dense.items()}
    lengths = {"cu_seqlens_q": integers(0, 3, 3, 250), "cu_seqlens_k": integers(0, 20, 60, 299), "causal": True}
    yield "attention_varlen", *_pair(attention_varlen, reference.attention_varlen, lengths), packed


def _normal(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def _pair(function: Function, oracle: Function, options: dict[str, Any]) -> tuple[Function, Function]:
    def ours(**tensors: Tensor) -> Any:
        return function(**tensors, **options, return_lse=True)

    def specified(*, dtype: torch.dtype, **tensors: Tensor) -> Any:
        return oracle(**tensors, **options, return_lse=True, dtype=dtype)

    return ours, specified


def _error(function: Function, oracle: Function, inputs: dict[str, Tensor], dtype: torch.dtype) -> float:
    """The largest error of outputs and gradients, each as a share of what the error rule allows."""
    ours = _results(function, inputs)
    exact = _results(partial(oracle, dtype=torch.float64), {name: x.double() for name, x in inputs.items()})
    torchs = _results(partial(oracle, dtype=dtype), inputs)
    worst = torch.zeros((), dtype=torch.float64)
    for name, expected in exact.items():
        finite = expected.isfinite()
        if not torch.equal(ours[name][~finite].double(), expected[~finite]):
            return math.inf
        error = (ours[name][finite].double() - expected[finite]).abs().max().cpu()
        factor = 6.0 if name.startswith("d") else 4.0
        allowed = reference.error_bound(expected, torchs[name], ours[name].dtype, factor)
        worst = torch.maximum(worst, error / allowed)  # keeps NaN
    return worst.item()


def _results(function: Function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, lse and the gradient of every input, by name, for fixed incoming gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    results = dict(zip(("out", "lse"), outputs, strict=False))
    results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}
