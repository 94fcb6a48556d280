"""Who is measured: ours and everyone else. A new peer is one subclass of Candidate and one list entry."""

from typing import Any

from candidate import OPTIONS, Attention, Candidate, Inputs
from package_candidates import PACKAGE_CANDIDATES
from suites import Case
from torch_candidates import TORCH_CANDIDATES

import flash_attn_ext


def flash_options(case: Case, inputs: Inputs, heads: slice = slice(None)) -> dict[str, Any]:
    """The case, of these heads, in the words of flash_attn_ext.attention; bias, mask and dropout are not among them."""
    return {
        "causal": case.causal,
        "window_size": (-1 if case.window is None else case.window, -1),
        "softcap": case.softcap,
        "alibi_slopes": None if inputs.alibi_slopes is None else inputs.alibi_slopes[heads],
        "sinks": None if inputs.sinks is None else inputs.sinks[heads],
    }


class Ours(Candidate):
    name = "flash_attn_ext"
    devices = ("cpu", "cuda")
    takes = frozenset({"dense", *OPTIONS})

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        options = flash_options(case, inputs)
        if case.lengths:
            cu_seqlens = inputs.cu_seqlens
            options |= {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": case.seqlen_q, "max_seqlen_k": case.seqlen_k}
            return lambda q, k, v: flash_attn_ext.attention_varlen(q, k, v, **options)
        options |= {"mask": inputs.mask, "dropout_p": case.dropout}
        return lambda q, k, v, bias=None: flash_attn_ext.attention(q, k, v, bias=bias, **options)


OURS = Ours.name
CANDIDATES: dict[str, Candidate] = {c.name: c for c in (Ours(), *TORCH_CANDIDATES, *PACKAGE_CANDIDATES)}


def usual_candidates(device: str) -> list[str]:
    """Those that are measured on the device where none are named."""
    return [name for name, candidate in CANDIDATES.items() if device in candidate.devices]
