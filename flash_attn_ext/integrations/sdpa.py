"""torch's scaled_dot_product_attention, carried out by this package: `enable`, `disable`, `stats`.

Calls arrive in two ways, which are opened and closed together:

1. By name. torch.nn.functional.scaled_dot_product_attention becomes `_attend`, which takes all that this package can
   do, dropout and masks with gradients among it, on the CPU and on CUDA, and gives the rest to torch's function.
2. Below the name. Who holds torch's function itself (a `from torch.nn.functional import ...` of before), C++ code,
   nested tensors and torch.nn.attention.varlen_attn end in torch's own choice of a kernel; where that is the flash
   kernel, ours takes its place (flash_kernels.py). What torch gives to another kernel there is not seen here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .. import counts
from ..counts import Stats
from ..errors import InputError
from ..ops import cuda_library_status
from ..sdpa import is_causal_bias, scaled_dot_product_attention, without_causal_bias
from . import flash_kernels

_Function = TypeVar("_Function", bound=Callable[..., Any])
# Runs when torch.compile traces, not in the graph, where the result is a constant.
_while_tracing: Callable[[_Function], _Function] = torch.compiler.assume_constant_result
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_HEAD_DIM = 512
_NAME = "scaled_dot_product_attention"  # in counts
# What the classes of tensors have as __torch_function__ that leave torch's functions as they are.
_NO_FUNCTIONS = torch._C._disabled_torch_function_impl
_TORCHS_FUNCTIONS = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


class _State:
    """What is switched on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.enabled = False
        self.torchs: Any = F.scaled_dot_product_attention  # from before, like the next
        self.fast_path = True  # of torch.backends.mha


_state = _State()


class Enabled:
    """What `enable` returns: as a context manager, it switches off at the end what it has switched on."""

    def __init__(self, was_enabled: bool) -> None:
        self._was_enabled = was_enabled

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._was_enabled:
            disable()


def enable() -> Enabled:
    """Sends scaled_dot_product_attention here, for the whole process, until `disable` or the end of a `with` block.

    Covers nn.TransformerEncoder and its kind, timm, diffusers, nanoGPT: whatever calls torch's function; compiled code
    is compiled anew. What cannot be taken goes back to torch, and `stats` shows it with its reason. Dropout draws from
    the same generator as torch's, but other numbers.

    torch.nn.TransformerEncoderLayer in eval mode has a fast path without scaled_dot_product_attention: it is off
    meanwhile (torch.backends.mha). A torch.nn.attention.sdpa_kernel that excludes FLASH_ATTENTION holds here too.

    Returns:
        A context manager, for `with enable(): ...`.
    """
    with _state.lock:
        was_enabled = _state.enabled
        if not was_enabled:
            counts.start(_NAME)
            flash_kernels.install(_count_kernel)
            _state.torchs = F.scaled_dot_product_attention
            _state.fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            F.scaled_dot_product_attention = _attend
            _state.enabled = True
    return Enabled(was_enabled)


def disable() -> None:
    """Undoes `enable`. Does nothing where that was not called.

    Raises:
        RuntimeError: torch.nn.functional.scaled_dot_product_attention has been replaced by somebody else meanwhile.
    """
    with _state.lock:
        if not _state.enabled:
            return
        if F.scaled_dot_product_attention is not _attend:
            raise RuntimeError(
                "torch.nn.functional.scaled_dot_product_attention was expected to be that of flash_attn_ext, and is "
                f"{F.scaled_dot_product_attention!r}: undo what replaced it first"
            )
        F.scaled_dot_product_attention = _state.torchs
        torch.backends.mha.set_fastpath_enabled(_state.fast_path)
        flash_kernels.uninstall()
        counts.stop(_NAME)
        _state.enabled = False


def stats() -> Stats:
    """What became of the calls from the last `enable` to its end."""
    return counts.stats(_NAME)


def active() -> tuple[str, ...]:
    """What of torch's is ours at present; nothing, unless enabled."""
    return (f"torch.nn.functional.{_NAME}", *flash_kernels.active()) if _state.enabled else ()


def _count_kernel(reason: str | None) -> None:
    counts.add(_NAME, "kernels", reason)


@_while_tracing
def _flash_is_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch.nn.functional.scaled_dot_product_attention is while enabled."""
    options: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    # Who has imported the name while it was ours may call it for ever.
    reason = _why_not(query, key, value, attn_mask, dropout_p) if _state.enabled else "disabled"
    if torch.compiler.is_compiling():
        counts.count(_NAME, reason)
        return (_torchs if reason else scaled_dot_product_attention)(query, key, value, **options)
    if reason is None:
        try:
            out = scaled_dot_product_attention(query, key, value, **options)
        except InputError as error:
            # torch takes it, or says in its own words why not.
            reason = "; ".join(error.constraints)
        else:
            counts.count(_NAME)
            return out
    counts.count(_NAME, reason)
    return _torchs(query, key, value, **options)


def _torchs(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Torch's function. It recognises a CausalBias only where it is called by its name, which is ours meanwhile."""
    if is_causal_bias(options["attn_mask"]):
        mask, is_causal = without_causal_bias(options["attn_mask"], options["is_causal"], query.device)
        options |= {"attn_mask": mask, "is_causal": is_causal}
    return _state.torchs(query, key, value, **options)


def _why_not(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> str | None:
    """Why a call is torch's, as far as dtypes, devices and settings tell, without its values."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not all(isinstance(x, Tensor) for x in tensors):
        return "not a tensor"
    if any(_has_functions_of_its_own(x) for x in tensors):
        return "a tensor subclass with an attention of its own"
    if any(x.is_nested for x in tensors):
        return "nested tensors"
    if any(_is_dtensor(x) for x in tensors):
        if not _dtensors_are_registered():
            return "DTensors, without integrations.dtensor.register()"
        if dropout_p > 0:
            return "DTensors with dropout"
    if not _flash_is_allowed():
        return "flash attention is switched off (torch.nn.attention.sdpa_kernel, torch.backends.cuda)"
    device, dtype = query.device.type, query.dtype
    if device not in ("cpu", "cuda", "meta"):
        return f"device {device}"
    if dtype not in _DTYPES or (device == "cuda" and dtype == torch.float64):
        return f"{dtype} on {device}"
    if device == "cuda" and (why := _cuda_declines(query.device)):
        return why
    if any(x.dim() > 0 and x.shape[-1] > _LARGEST_HEAD_DIM for x in (query, value)):
        return f"a head dimension above {_LARGEST_HEAD_DIM}"
    return None


def _has_functions_of_its_own(x: Tensor) -> bool:
    """By its class: modes, such as torch.device as a context, are active for all tensors and need no other way."""
    if type(x) in (Tensor, torch.nn.Parameter) or is_causal_bias(x):
        return False
    function = type(x).__torch_function__
    return function is not _NO_FUNCTIONS and getattr(function, "__func__", None) is not _TORCHS_FUNCTIONS


def _is_dtensor(x: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # not imported for this: who has one has imported it
    return tensor is not None and isinstance(x, tensor.DTensor)


def _dtensors_are_registered() -> bool:
    dtensor = sys.modules.get(f"{__package__}.dtensor")
    return dtensor is not None and bool(dtensor.active())


@_while_tracing
def _cuda_declines(device: torch.device) -> str | None:
    if cuda_library_status != "loaded":
        return f"the CUDA library is {cuda_library_status}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"compute capability {'.'.join(map(str, capability))}, 8.0 is needed"
