"""Loads the op libraries and tells torch the shapes that the ops return (fake kernels).

The ops are torch.ops.flash_attn_ext.{forward, backward, merge, merge_backward, softmax, softmax_backward}, and `check`,
which does what forward does with wrong arguments and no more; their schemas are in the native library. Gradients and
vmap are in autograd.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, constraints_of

_FOLDER = Path(__file__).parent
LIBRARY = _FOLDER / "libflash_attn_ext.so"
CUDA_LIBRARY = _FOLDER / "libflash_attn_ext_cuda.so"


def _load() -> str:
    """Loads what every machine has; returns the version."""
    try:
        torch.ops.load_library(str(LIBRARY))
        version: str = import_module("._C", __package__).build_info()["version"]
    except ValueError as error:  # a wrong FAE_CPU_LEVEL
        raise ImportError(f"flash_attn_ext cannot start: {error}") from None
    except (OSError, ImportError) as error:
        raise ImportError(
            f"flash_attn_ext needs its compiled libraries ({error.__cause__ or error}): build them with "
            "`pip install --no-build-isolation -e .` in the source tree, or install the package with `pip install .`"
        ) from None
    return version


def _load_cuda() -> str:
    """Loads the CUDA library where there is one; returns in words what became of it."""
    if torch.version.cuda is None:
        return "not loaded: this torch has no CUDA"
    if not CUDA_LIBRARY.exists():
        return "not built: build with nvcc on the machine, or with FAE_CUDA=1"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        warnings.warn(f"flash_attn_ext runs without CUDA: {error}", stacklevel=2)
        return f"not loaded: {error}"
    return "loaded"


__version__ = _load()
"""Of the package and of its libraries."""
cuda_library_status = _load_cuda()
ops = torch.ops.flash_attn_ext


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of lse and sinks beside inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The tensors among the options of forward and backward, in the order of the schema; numbers follow.
OPTIONAL_TENSORS = (
    *("bias", "mask", "alibi_slopes", "sinks"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "rng_state"),
)


def _refuse(op: str, lines: Sequence[str], **tensors: Tensor | None) -> None:
    """The native checks do not run where one of the tensors is a meta tensor, so mixed devices end here.

    lines: other constraints that are not met.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, expected = next(iter(devices.items()))
    wrong = [f"{n} must be on {first}'s device {expected}, got {d}" for n, d in devices.items() if d != expected]
    if wrong or lines:
        raise RuntimeError(str(InputError(op, [*wrong, *lines])))


_MAX_SEQLENS = slice(3 + len(OPTIONAL_TENSORS), 5 + len(OPTIONAL_TENSORS))


def _unmet(*arguments: Any) -> list[str]:
    """What the native checks find in arguments of the op forward, by stand-ins that are no fake tensors.

    Nothing where a size or a number is symbolic, which a comparison would fix, or in torch.compile: there the call
    itself finds it, with all that its function found, and its error stays one of ours.
    """
    sizes = [n for x in arguments for n in (x.shape if isinstance(x, Tensor) else (x,))]
    if any(isinstance(n, (torch.SymInt, torch.SymFloat)) for n in sizes):
        return []
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return []
    # max_seqlen may be more than the longest sequence has, which cannot be read here: a bias may cover no more.
    arguments = (*arguments[: _MAX_SEQLENS.start], None, None, *arguments[_MAX_SEQLENS.stop :])
    with torch._C._DisableTorchDispatch():
        stand_ins = (
            torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x for x in arguments
        )
        try:
            ops.check(*stand_ins)
        except RuntimeError as error:
            if lines := constraints_of(error):
                return lines
            raise
    return []


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    given = dict(zip(OPTIONAL_TENSORS, options, strict=False))
    _refuse("forward", _unmet(q, k, v, *options), q=q, k=k, v=v, **given)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    *batch, rows, heads, _ = q.shape  # batch is empty for packed tensors
    return out, q.new_empty((*batch, heads, rows), dtype=stats_dtype(q.dtype))


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = dict(zip(OPTIONAL_TENSORS, options, strict=False))
    unmet = _unmet(q, k, v, *options[:-2])
    _refuse("backward", unmet, q=q, k=k, v=v, dout=dout, dlse=dlse, out=out, lse=lse, **given)
    bias, sinks, bias_requires_grad = given["bias"], given["sinks"], options[-1]
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else q.new_empty((0,))
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None else lse.new_empty((0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _refuse("merge", (), out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _merge_backward(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (out_a, lse_a, out_b, lse_b)
    dout_a, dlse_a, dout_b, dlse_b = (x.new_empty(x.shape) for x in inputs)
    return dout_a, dlse_a, dout_b, dlse_b


def _softmax(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


_fakes: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "backward": _backward,
    "merge": _merge,
    "merge_backward": _merge_backward,
    "softmax": _softmax,
    "softmax_backward": _softmax_backward,
}
for _name, _fake in _fakes.items():
    torch.library.register_fake(f"flash_attn_ext::{_name}", _fake)
