"""attention, attention_varlen, merge and softmax: the package's own functions over the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .autograd import Attention, Merge, Softmax, refused_gradients, run
from .errors import (
    InputError,
    as_integer,
    constraints_of,
    raise_input_error,
    refuse,
    shown,
    wrong_flags,
    wrong_kinds,
)
from .ops import stats_dtype

# (left, right) as the ops have it: row i sees keys i + shift - left <= j <= i + shift + right, None: no limit.
Window = tuple[int | None, int | None]

_KINDS = {
    **dict.fromkeys(("q", "k", "v"), "tensor"),
    **dict.fromkeys(("bias", "mask", "alibi_slopes", "sinks", "seqused_q", "seqused_k"), "tensor?"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "tensor?"),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "integer?"),
    **dict.fromkeys(("softcap", "dropout_p"), "number"),
    "softmax_scale": "number?",
}
# Without these a call means something else; the others can be left out to find what else is wrong.
_LEFT_OUT = _KINDS.keys() - {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"}
_KEPT = ("window", "cu_seqlens_q", "cu_seqlens_k", "rng_state", "deterministic", "call")
_MERGE_KINDS = dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b"), "tensor")
_run_attention = partial(run, Attention)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Any:
    """Exact attention, softmax(scores) v, without the matrix of scores in memory (FlashAttention, arXiv 2205.14135)::

        score = softcap tanh(softmax_scale q.k / softcap) - slope |i + shift - j| + bias,   shift = seqlen_k - seqlen_q

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or, on the CPU, float64. Products of float32
            on CUDA have float32 accuracy, or that of tf32 where torch.backends.cuda.matmul.allow_tf32 is set.
        k: (batch, seqlen_k, heads_kv, head_dim), q's dtype and device; heads must be a multiple of heads_kv, and
            neighbouring query heads share a key head (grouped-query attention, arXiv 2305.13245).
        v: (batch, seqlen_k, heads_kv, head_dim_v). head_dim and head_dim_v are 1 to 512 and may differ. Strides of q,
            k and v are free; where the last one is not 1, one copy is made.
        causal: row i sees keys j <= i + shift: the diagonal ends in the bottom right corner.
        window_size: (left, right): row i sees keys i + shift - left <= j <= i + shift + right; -1 is no limit. causal
            makes right 0.
        softmax_scale: any number that float32 holds (beside float64 inputs: float64); None is 1 / sqrt(head_dim).
        softcap: limits scores to (-softcap, softcap) (Gemma 2, arXiv 2408.00118, section 2); 0 is off. Neither of the
            two has a gradient: tensors that require one are refused.
        bias: added to the scores; broadcasts to (batch, heads, seqlen_q, seqlen_k); q's dtype or float32. Has a
            gradient, in its own shape.
        mask: bool, broadcasts like bias; True = attend.
        alibi_slopes: (heads,) or (batch, heads) float32: ALiBi (arXiv 2108.12409). No gradient: refused if they
            require one.
        sinks: (heads,) logits that take part in the softmax without a value, and have a gradient.
        dropout_p: probability, 0 to 1, with which elements of the softmax are dropped: the nearest multiple of 2^-15
            (the rest is scaled by 1 / (1 - dropout_p)). Random numbers come from torch's generator of q's device.
        seqused_q, seqused_k: (batch,) int32: how many rows and keys of each sequence are in use; the diagonal follows
            them. Rows beyond give out 0 and lse -inf.
        deterministic: the gradients are the same, bit for bit, from run to run. So they are with False: no
            backend has a backward that would be faster.
        return_lse: return (out, lse) instead of out.

    Returns:
        out: (batch, seqlen_q, heads, head_dim_v), q's dtype; differentiable.
        lse: (batch, heads, seqlen_q), float32 (float64 for float64): the natural logarithm of the softmax's
            denominator; differentiable.
        A row that sees nothing has out 0, lse -inf (the sink, where there is one) and gradients 0.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    window, unmet = window_of(causal, window_size)
    unmet += wrong_flags(deterministic=deterministic, return_lse=return_lse)
    out, lse = attend(
        "attention",
        q,
        k,
        v,
        unmet,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Any:
    """`attention` over packed sequences of different lengths, without padding. What is not listed is as there.

    Args:
        q: (total_q, heads, head_dim): the sequences one after the other.
        k: (total_k, heads_kv, head_dim).
        v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q: (batch + 1,) int32: sequence b holds rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]; starts with 0,
            never decreases, and ends at total_q or before.
        cu_seqlens_k: the same for k and v; None: the same as cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: lengths that no sequence exceeds, a hint: without it, kernels made for short
            sequences are not taken.
        bias, mask: the last two dimensions count rows and keys from the start of each sequence; they are 1 or at
            least as long as the longest sequence.

    Returns:
        out: (total_q, heads, head_dim_v), q's dtype; differentiable.
        lse: (heads, total_q), if return_lse; differentiable.
        Rows that belong to no sequence have out 0 and lse -inf.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    window, unmet = window_of(causal, window_size)
    unmet += wrong_flags(deterministic=deterministic, return_lse=return_lse)
    if not isinstance(cu_seqlens_q, Tensor):
        unmet.append(f"cu_seqlens_q must be a torch.Tensor, got {shown(cu_seqlens_q)}")
        raise InputError("attention_varlen", unmet)
    out, lse = attend(
        "attention_varlen",
        q,
        k,
        v,
        unmet,
        window=window,
        **lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale=softmax_scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins the attention of the same queries over two sets of keys into the attention over both.

    The block formula of online softmax (arXiv 1805.02867, section 3.1), on normalised results::

        lse = log(e^lse_a + e^lse_b),   out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

    Args:
        out_a, out_b: (batch, seqlen_q, heads, head_dim) or packed (total_q, heads, head_dim), one dtype.
        lse_a, lse_b: (batch, heads, seqlen_q) or (heads, total_q), float32 (float64 for float64); -inf where a row saw
            nothing.

    Returns:
        out, lse: in the same shapes and dtypes; differentiable.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    try:
        return run(Merge, out_a, lse_a, out_b, lse_b)
    except Exception as error:
        raise_input_error("merge", error, locals(), _MERGE_KINDS)


def softmax(x: Tensor) -> Tensor:
    """softmax(x) over the last dimension, its maximum and sum found in one pass (online softmax, arXiv 1805.02867,
    algorithm 3).

    Args:
        x: (..., n), float64, float32, bfloat16 or float16. A row of -inf gives NaN, as torch.softmax does.

    Returns:
        The same shape and dtype; differentiable.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    try:
        return run(Softmax, x)
    except Exception as error:
        raise_input_error("softmax", error, locals(), {"x": "tensor"})


def window_of(causal: bool, window_size: tuple[int, int]) -> tuple[Window, list[str]]:
    """The window of the ops from the public convention, and the constraints that the two do not meet."""
    unmet = wrong_flags(causal=causal)
    is_pair = isinstance(window_size, Sequence) and len(window_size) == 2
    left, right = map(as_integer, window_size) if is_pair else (None, None)
    if left is None or right is None or left < -1 or right < -1:
        line = f"window_size must be two integers (left, right), each -1 (no limit) or at least 0, got {window_size!r}"
        return (None, None), [*unmet, line]
    if left >= 2**63 or right >= 2**63:
        return (None, None), [*unmet, f"window_size must be below 2**63, got {window_size!r}"]
    if unmet:
        return (None, None), unmet
    return (None if left == -1 else left, 0 if causal else None if right == -1 else right), []


def lengths_of(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> dict[str, Any]:
    """What `attend` takes of packed sequences; those of keys are as long as those of queries unless it is said."""
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }


def attend(function: str, q: Tensor, k: Tensor, v: Tensor, unmet: Sequence[str] = (), **options: Any) -> Any:
    """What every public attention function ends in: `_attend`, outside of graphs where they lack a number."""
    if torch.compiler.is_dynamo_compiling():
        numbers = (options.get(name) for name in ("softmax_scale", "softcap", "dropout_p"))
        if any(isinstance(x, Tensor) for x in numbers):
            from . import tracing

            return tracing.with_numbers(_attend, function, q, k, v, unmet, **options)
    return _attend(function, q, k, v, unmet, **options)


def _attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unmet: Sequence[str] = (),
    *,
    window: Window = (None, None),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    rng_state: Tensor | None = None,
    deterministic: bool = True,
    call: Callable[..., Any] = _run_attention,
) -> Any:
    """(out, lse), or an InputError of `function`.

    Fills in what the op takes no default for. window: any integers. rng_state: drawn unless given. unmet: constraints
    that `function` itself found unmet; the call is then tried with what is left, so that the error can list all.
    call: what gets the arguments of the op, and deterministic, instead of the op.
    """
    wrong: dict[str, str] = {}
    try:
        scale, state, sink_logits = softmax_scale, rng_state, sinks
        q, k, v, bias = autocast(q, k, v, bias)
        if scale is None:
            scale = max(q.shape[-1], 1) ** -0.5 if q.dim() else 1.0
        if sink_logits is not None and sink_logits.is_floating_point():
            sink_logits = sink_logits.to(stats_dtype(q.dtype))
        if dropout_p > 0 and state is None:
            state = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=q.device)
        result = call(
            q,
            k,
            v,
            _four_dimensional(bias),
            _four_dimensional(mask),
            alibi_slopes,
            sink_logits,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            state,
            max_seqlen_q,
            max_seqlen_k,
            *window,
            scale,
            softcap,
            dropout_p,
            q.is_cuda and torch.backends.cuda.matmul.allow_tf32,
            deterministic,
        )
    except Exception as error:
        given = locals()
        found = constraints_of(error)
        if found:
            unmet = [*unmet, *(line for line in refused_gradients(given) if line not in found)]
        wrong = {} if found else wrong_kinds(given, _KINDS)
        if not wrong or not wrong.keys() <= _LEFT_OUT:
            raise_input_error(function, error, given, _KINDS, unmet)
    if wrong:  # outside of the handler, so that its error is not shown as the cause of the next
        options = {name: given[name] for name in (*_KEPT, *_LEFT_OUT - wrong.keys())}
        return _attend(function, q, k, v, [*unmet, *wrong.values()], **options)
    if unmet:
        refuse(function, unmet)
    return result


def autocast(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Under torch.autocast q, k and v take its dtype, as they do for torch's own attention; float64 stays."""
    if not torch._C._is_any_autocast_enabled():  # a quarter of the time that the next question takes
        return q, k, v, bias
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    # A float32 bias is welcome beside any dtype.
    return cast(q), cast(k), cast(v), bias if bias is None or bias.dtype == torch.float32 else cast(bias)


def _four_dimensional(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() >= 4 else x[(None,) * (4 - x.dim())]
