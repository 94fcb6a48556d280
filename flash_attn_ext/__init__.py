"""Exact attention without the matrix of scores: tiled online-softmax forward, recomputation backward.

Layout (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim) for the varlen functions.
"""

from importlib import import_module
from types import ModuleType

from . import flops  # noqa: F401  (registers FLOP counts)
from .attention import attention, attention_varlen, merge, softmax
from .errors import InputError
from .explain import Explanation, backends, explain
from .flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .modules import FlashAttention, MultiheadAttention
from .ops import __version__
from .padding import pad_input, unpad_input
from .sdpa import scaled_dot_product_attention

__all__ = [
    "Explanation",
    "FlashAttention",
    "InputError",
    "MultiheadAttention",
    "__version__",
    "attention",
    "attention_varlen",
    "backends",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "merge",
    "pad_input",
    "scaled_dot_product_attention",
    "softmax",
    "unpad_input",
]


def __getattr__(name: str) -> ModuleType:
    """Modules that are imported when they are first named, since others do without them."""
    if name in ("integrations", "shim"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
