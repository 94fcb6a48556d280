"""Attention for the models of Hugging Face transformers, 4.57 and newer, on CPU and GPU.

    from flash_attn_ext.integrations import transformers as fa_ext
    fa_ext.register()
    model.set_attn_implementation("fa_ext")       # or from_pretrained(..., attn_implementation="fa_ext")

Registers an attention function and a mask function. The mask function describes causal order, sliding windows, chunks,
packed sequences and padding (`AttentionMask`), so that no mask of seqlen_q x seqlen_k is in memory. What it does not
recognise, and everything while torch.compile traces, is the library's own mask for SDPA, a boolean tensor.
A row that sees nothing, such as a padded query, gives 0, as with SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
except ImportError as error:
    raise ImportError(f"flash_attn_ext.integrations.transformers needs transformers 4.57 or newer: {error}") from error

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:  # transformers 4
    _collector = None

from .. import counts
from ..attention import Window, attend
from ..counts import Stats
from ..errors import InputError
from .mask_patterns import band_of_call
from .masks import AttentionMask, Band

NAME = "fa_ext"
_FUNCTION = "integrations.transformers"

# Arguments of other attention functions that change the result, and that there is nothing for here.
_NOT_TAKEN = {
    "output_attentions": "attention weights are never in memory; use attn_implementation='eager' to see them",
    "head_mask": "masks of whole heads are not supported; use attn_implementation='eager'",
    "block_indices": "attention to selected blocks of keys is not supported; use attn_implementation='eager'",
    "block_table": "paged caches are not supported",
}
# Arguments that change nothing here. Models hand on all that they are called with: what is for other parts of them, for
# the loss, or comes from a tokenizer; positions and lengths whose effect is in query, key, mask and cu_seq_lens; speed.
_NO_EFFECT = frozenset(
    {
        *("use_cache", "return_dict", "logits_to_keep", "output_hidden_states", "output_router_logits"),
        *("labels", "shift_labels", "ignore_index", "num_items_in_batch"),
        *("token_type_ids", "mm_token_type_ids", "special_tokens_mask", "offset_mapping", "length"),
        *("position_ids", "cache_position", "seq_idx", "max_length_q", "max_length_k"),
        *("deterministic", "kernel_options"),
    }
)
# Models whose own code extends the mask by scores, and so needs one that is added to scores.
_MODELS_WITH_ADDED_MASKS = ("deepseek_v4", "informer")
# Models some of whose modules say is_causal and see everything, where their eager attention gets no mask.
_MODELS_WITH_WRONG_IS_CAUSAL = ("bridgetower", "bridgetower_text_model")


def register(name: str = NAME) -> None:
    """Makes `name` an attention implementation of transformers. Models use it once they are told to.

    Raises:
        InputError: transformers takes names with "flash", "sdpa", "flex_attention", "eager" or "paged" in them for
            its own.
    """
    reserved = [word for word in ("flash", "sdpa", "flex_attention", "eager", "paged") if word in name]
    if reserved:
        raise InputError(f"{_FUNCTION}.register", [f"name must not contain {reserved[0]!r}, got {name!r}"])
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, mask_function)
    counts.start(_FUNCTION)


def active() -> tuple[str, ...]:
    """The names under which transformers has our attention function at present; none before `register`."""
    functions = AttentionInterface().items()
    return tuple(f"the attention implementation {key!r}" for key, x in functions if x is attention_function)


def stats() -> Stats:
    """Calls of the attention function since the first `register`. None goes back: what cannot be taken raises."""
    return counts.stats(_FUNCTION)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        query: (batch, heads, seqlen_q, head_dim).
        key, value: (batch, heads_kv, seqlen_k, head_dim and head_dim_v).
        attention_mask: an `AttentionMask`; or a tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), bool with
            True = attend, or floating, added to the scores; or None: is_causal and sliding_window are the mask.
        is_causal, sliding_window: count where attention_mask is None; a mask has both in it already. is_causal None: as
            module.is_causal says, and True where it says nothing. Causal order starts in the top left corner; a single
            row is the last one, and sees all. With sliding_window a row sees so many keys, itself among them, and
            without causal order as many after it.
        s_aux: (heads,) attention sinks. sinks: (batch, heads, seqlen_q, 1), a sink for every row.
        position_bias: broadcasts to (batch, heads, seqlen_q, seqlen_k); added to the scores.
        indices: (batch, seqlen_q, count): the keys that each row sees, as far as attention_mask lets it.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,): packed sequences, in batch * seqlen rows.

    Returns:
        (batch, seqlen_q, heads, head_dim_v), and None where other functions return attention weights.

    Raises:
        InputError: what cannot be taken, and why.
    """
    given = {name for name, value in others.items() if value is not None and value is not False}
    if _weights_are_collected():
        given.add("output_attentions")
    if refused := sorted(given - _NO_EFFECT):
        unknown = "this attention does not know it; use attn_implementation='eager'"
        raise InputError(_FUNCTION, [f"{x} must not be given: {_NOT_TAKEN.get(x, unknown)}" for x in refused])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if len(q) != len(k):  # learned queries, of batch 1, in some vision models
        q, k, v = (x.expand(max(len(q), len(k)), -1, -1, -1) for x in (q, k, v))
    (batch, seqlen_q), seqlen_k = q.shape[:2], k.shape[1]
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.shape[-1] > seqlen_k:  # made for a longer cache, as in transformers 4
        mask = mask[..., :seqlen_k]
    if indices is not None:
        mask = _at_indices(mask, indices, seqlen_k)

    lengths = None if cu_seq_lens_q is None else (cu_seq_lens_q, cu_seq_lens_k)
    scaling = _gpt2_scaling(module, q.shape[-1]) if scaling is None else scaling
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "dropout_p": dropout,
    }
    if mask is None:
        is_causal = _is_causal(module) if is_causal is None else is_causal
        causal = is_causal and seqlen_q > 1
        left = None if sliding_window is None else sliding_window - 1
        shift = 0 if causal else seqlen_k - seqlen_q
        band = Band(batch, seqlen_q, seqlen_k, q.device, left, 0 if causal else left, shift)
        options |= _band_options(band, bias, lengths)
    elif isinstance(mask, AttentionMask) and mask.band is not None:
        options |= _band_options(mask.band, bias, lengths)
    elif cu_seq_lens_q is not None:
        raise InputError(_FUNCTION, ["cu_seq_lens_q must not be given beside a mask of its own, got both"])
    elif mask.dtype == torch.bool:
        options["mask"] = mask.dense if isinstance(mask, AttentionMask) else mask
    elif mask.is_floating_point():
        bias = mask if bias is None else bias + mask
    else:
        raise InputError(_FUNCTION, [f"attention_mask must be bool or floating, got {mask.dtype}"])
    if bias is not None:
        as_it_is = bias.dtype == torch.float32 and q.dtype != torch.float64
        options["bias"] = bias if as_it_is else bias.to(q.dtype)

    packed = "cu_seqlens_q" in options
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = attend(_FUNCTION, q, k, v, **options)
    counts.count(_FUNCTION)
    out = out.view(batch, seqlen_q, *out.shape[-2:])
    if sinks is not None:
        # A sink takes its share of the softmax's denominator, and leaves e^lse / (e^lse + e^sink).
        lse = lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1) if packed else lse
        out = out * torch.sigmoid(lse[..., None] - sinks).transpose(1, 2).to(out.dtype)
    return out, None


def mask_function(**call: Any) -> Tensor | None:
    """transformers' mask function: takes the arguments of `masking_utils.sdpa_mask` of the installed version, by name.

    Returns:
        An `AttentionMask`; or None for a single row that sees everything. While torch.compile traces, and for the
        single rows that may enter a compiled model, what `sdpa_mask` returns: a boolean tensor (batch, 1, seqlen_q,
        seqlen_k), or None where a module's is_causal is the mask.
    """
    if getattr(call.get("config"), "model_type", None) in _MODELS_WITH_ADDED_MASKS:
        return masking_utils.eager_mask(**call)
    one_row = call.get("q_length") == 1 or ("cache_position" in call and len(call["cache_position"]) == 1)
    if torch.compiler.is_compiling() or (one_row and not call.get("allow_is_causal_skip", True)):
        return masking_utils.sdpa_mask(**call)
    band = None if one_row else band_of_call(**call)
    if band is not None:
        return AttentionMask(band)
    # Without skips, as None would leave it to the module what rows see.
    skips = {} if one_row else {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking_utils.sdpa_mask(**{**call, **skips})
    return None if mask is None else AttentionMask(mask)


def _weights_are_collected() -> bool:
    """Whether the caller of the model asked for attention weights, which models of transformers 5 collect with hooks:
    not all of them tell the attention function."""
    if _collector is None:
        return False
    collected = _collector.global_var if torch.compiler.is_compiling() else _collector.get()
    return any("attentions" in key for key in collected or ())


def _band_options(
    band: Band, bias: Tensor | None, lengths: tuple[Tensor, Tensor | None] | None
) -> dict[str, Tensor | Window | None]:
    """The arguments of `attend` that do what the band says, in the packed sequences `lengths` (cu_seqlens_q, _k)."""
    in_sequence = (band.left, band.right)
    if lengths is not None:
        beside = None
        if bias is not None:
            beside = "position_bias"
        elif band.padding is not None:
            beside = "an attention_mask with padding"
        elif band.starts is not None and len(band.cu_seqlens) != len(lengths[0]):
            beside = f"position_ids of {len(band.cu_seqlens) - 1} sequences where it has {len(lengths[0]) - 1}"
        if beside is not None:
            raise InputError(_FUNCTION, [f"cu_seq_lens_q must not be given beside {beside}"])
        cu_seqlens_q, cu_seqlens_k = lengths[0].int(), (lengths[0] if lengths[1] is None else lengths[1]).int()
        return {"window": in_sequence, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if band.starts is not None:
        if bias is not None or band.padding is not None:  # they count in the batch, not in each sequence
            return {"mask": band.dense()}
        return {"window": in_sequence, "cu_seqlens_q": band.cu_seqlens, "cu_seqlens_k": band.cu_seqlens}
    if band.padding is None:
        return {"window": band.window}
    if in_sequence == (None, None) and band.lengths is not None:
        return {"seqused_k": band.lengths}
    return {"window": band.window, "mask": band.padding[:, None, None]}


def _is_causal(module: nn.Module) -> bool:
    if getattr(getattr(module, "config", None), "model_type", None) in _MODELS_WITH_WRONG_IS_CAUSAL:
        return False
    return getattr(module, "is_causal", True)


def _gpt2_scaling(module: Any, head_dim: int) -> float | None:
    """In transformers 4, GPT-2 leaves its scaling to attention functions that know its switches. None: not GPT-2."""
    if not hasattr(module, "scale_attn_by_inverse_layer_idx"):
        return None
    layer = module.layer_idx + 1 if module.scale_attn_by_inverse_layer_idx else 1
    return (head_dim**-0.5 if module.scale_attn_weights else 1.0) / layer


def _at_indices(mask: Tensor | None, indices: Tensor, seqlen_k: int) -> Tensor:
    if mask is None:
        raise InputError(_FUNCTION, ["attention_mask must be given beside indices, got None"])
    visible = indices.new_zeros(*indices.shape[:2], seqlen_k, dtype=torch.bool).scatter(-1, indices.long(), True)
    visible = visible[:, None]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, float("-inf"))
