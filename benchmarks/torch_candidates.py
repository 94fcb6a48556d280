"""torch's own ways to compute attention: plain softmax, the backends of SDPA, its varlen function, FlexAttention."""

import inspect
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from candidate import Attention, Candidate, Inputs, visible
from suites import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def available_memory(device: str) -> float:
    """Bytes of the device's memory that can be taken now; unlimited where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        with open("/proc/meminfo") as meminfo:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo}
    except OSError:
        return math.inf
    return kib["MemAvailable"] * 1024


def too_large(case: Case, device: str, itemsize: int) -> str:
    """Why the matrix of scores does not fit; empty when it does."""
    # Probabilities kept for backward, their gradient, the scores' gradient and one temporary.
    need = 4 * case.batch * case.heads * case.seqlen_q * case.seqlen_k * itemsize
    return f"needs {need / 2**30:.0f} GiB" if need > 0.6 * available_memory(device) else ""


class Softmax(Candidate):
    """Attention as the textbook writes it: the whole score matrix, in the inputs' dtype."""

    name = "softmax"
    heads_first = True
    devices = ("cpu", "cuda")
    takes = frozenset({"dense", "bias", "mask"})

    def why_not(self, case: Case, device: str) -> str:
        itemsize = getattr(torch, case.dtype).itemsize
        return super().why_not(case, device) or too_large(case, device, itemsize)

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        allowed = visible(case, inputs.q.device.type) if inputs.mask is None else inputs.mask
        hidden = None if allowed is None else ~allowed
        group = case.heads // case.heads_kv

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            rows = q.unflatten(1, (-1, group)).flatten(2, 3)  # the query heads of one KV head share its matrix product
            scores = ((rows * case.head_dim**-0.5) @ k.transpose(-1, -2)).unflatten(2, (group, -1)).flatten(1, 2)
            if bias is not None:
                scores = scores + bias
            if hidden is not None:
                scores = scores.masked_fill(hidden, -math.inf)
            p = scores.softmax(-1).unflatten(1, (-1, group)).flatten(2, 3)
            return (p @ v).unflatten(2, (group, -1)).flatten(1, 2)

        return attend


class SDPA(Candidate):
    """torch's scaled_dot_product_attention with one of its backends.

    A window has to be a mask there; it is additive and made beforehand, which measures faster than a boolean one.
    """

    heads_first = True
    takes = frozenset({"dense", "bias", "mask", "dropout"})

    def __init__(self, name: str, backend: SDPBackend):
        self.name, self._backend = name, backend

    def context(self) -> AbstractContextManager[object]:
        return sdpa_kernel(self._backend)

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        constant = inputs.mask
        is_causal = case.causal and case.window is None and case.seqlen_q == case.seqlen_k
        allowed = None if is_causal else visible(case, inputs.q.device.type)
        if allowed is not None:
            constant = inputs.q.new_zeros(allowed.shape).masked_fill(~allowed, -math.inf)[None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            added = constant if bias is None else bias
            return scaled_dot_product_attention(
                q, k, v, added, dropout_p=case.dropout, is_causal=is_causal, enable_gqa=case.heads != case.heads_kv
            )

        return attend


class SDPAFlash(SDPA):
    devices = ("cpu", "cuda")


class SDPAMath(SDPA):
    devices = ("cpu", "cuda")

    def why_not(self, case: Case, device: str) -> str:
        # On a GPU it computes 16-bit inputs in float32.
        itemsize = 4 if device == "cuda" else getattr(torch, case.dtype).itemsize
        return super().why_not(case, device) or too_large(case, device, itemsize)


class Varlen(Candidate):
    """torch.nn.attention.varlen, for packed sequences."""

    name = "torch_varlen"
    takes = frozenset({"packed"})

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens, longest = inputs.cu_seqlens, case.seqlen_q
        # Causal order is a window from torch 2.11 on, a flag before.
        windows = "window_size" in inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = {"window_size": (-1, 0 if case.causal else -1)}
        if not windows:
            options = {"is_causal": case.causal}
        return lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


class Flex(Candidate):
    """FlexAttention, compiled for each case; as it is, without a compiler, on the CPU.

    Causal order, window, boolean mask and packed sequences are block masks, made beforehand; bias, softcap and ALiBi
    are score terms.
    """

    name = "flex_attention"
    heads_first = True
    takes = frozenset({"dense", "packed", "bias", "mask", "softcap", "alibi"})

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        from torch.nn.attention.flex_attention import flex_attention

        block_mask, shared = self._block_mask(case, inputs), case.bias == "heads"

        softcap, slopes, shift = case.softcap, inputs.alibi_slopes, case.seqlen_k - case.seqlen_q

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            def finish(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                if slopes is not None:
                    score = score - slopes[h] * (row + shift - key).abs()
                if bias is not None:
                    score = score + (bias[0, h, row, key] if shared else bias[b, h, row, key])
                return score

            return flex_attention(
                q,
                k,
                v,
                score_mod=finish if softcap or slopes is not None or bias is not None else None,
                block_mask=block_mask,
                enable_gqa=case.heads != case.heads_kv,
            )

        if inputs.q.device.type == "cpu":
            return attend
        import torch._functorch.config as functorch

        # The backward is timed on a kept graph: its buffers must stay. And torch compiles one function only a few times
        # before it gives up, so that each case starts with none.
        functorch.donated_buffer = False  # type: ignore[attr-defined]
        torch.compiler.reset()
        return torch.compile(attend, dynamic=False, fullgraph=True)

    def _block_mask(self, case: Case, inputs: Inputs) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        mask, cu_seqlens = inputs.mask, inputs.cu_seqlens
        if not case.causal and mask is None and cu_seqlens is None:
            return None
        rows, keys, device = inputs.q.shape[1], inputs.k.shape[1], inputs.q.device
        shift, causal, window = keys - rows, case.causal, case.window
        sequence = None
        if cu_seqlens is not None:
            numbers = torch.arange(len(case.lengths), device=device, dtype=torch.int32)
            sequence = numbers.repeat_interleave(cu_seqlens.diff(), output_size=rows)

        def counts(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            result = row >= 0
            if causal:
                result = result & (key <= row + shift)
            if window is not None:
                result = result & (key >= row + shift - window)
            if sequence is not None:
                result = result & (sequence[row] == sequence[key])
            if mask is not None:
                result = result & mask[b, 0, row, key]
            return result

        return create_block_mask(counts, None if mask is None else case.batch, None, rows, keys, device=str(device))


TORCH_CANDIDATES: tuple[Candidate, ...] = (
    SDPAFlash("sdpa_flash", SDPBackend.FLASH_ATTENTION),
    SDPA("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    SDPA("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
    SDPAMath("sdpa_math", SDPBackend.MATH),
    Varlen(),
    Flex(),
    Softmax(),
)
