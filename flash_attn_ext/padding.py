"""From padded batches to packed sequences and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import InputError, raise_input_error

_UNPAD_KINDS = {"hidden_states": "tensor", "attention_mask": "tensor", "unused_mask": "tensor?"}
_CONCATENATED_KINDS = dict.fromkeys(("hidden_states", "attention_mask_in_length"), "tensor")
_PAD_KINDS = {**dict.fromkeys(("hidden_states", "indices"), "tensor"), **dict.fromkeys(("batch", "seqlen"), "integer")}


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drops the padding: what attention_varlen takes, from a padded batch. Waits for the device once.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integer; nonzero = a token.
        unused_mask: (batch, seqlen), nonzero = room for a token that is not used yet: kept in the packed tensor, but
            not counted in `seqused`.

    Returns:
        hidden_states: (total, ...), the rows where either mask is set; differentiable.
        indices: (total,) int64, their places in the flattened (batch * seqlen).
        cu_seqlens: (batch + 1,) int32.
        max_seqlen: length of the longest sequence.
        seqused: (batch,) int32, tokens per sequence without the unused ones.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    try:
        unmet = []
        for name, mask in {"attention_mask": attention_mask, "unused_mask": unused_mask}.items():
            if mask is not None and (hidden_states.dim() < 2 or mask.shape != hidden_states.shape[:2]):
                unmet.append(
                    f"{name} must have shape (batch, seqlen), the first two dimensions of hidden_states "
                    f"{tuple(hidden_states.shape)}, got {tuple(mask.shape)}"
                )
        if unmet:
            raise InputError("unpad_input", unmet)
        tokens = attention_mask != 0
        rows = tokens if unused_mask is None else tokens | (unused_mask != 0)
        lengths = rows.sum(1, dtype=torch.int32)
        indices = rows.flatten().nonzero().flatten()
        cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        max_seqlen = int(lengths.max()) if len(lengths) else 0
        return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, max_seqlen, tokens.sum(1, dtype=torch.int32)
    except Exception as error:
        raise_input_error("unpad_input", error, locals(), _UNPAD_KINDS)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed rows back in their places in a padded batch, with zeros elsewhere.

    Args:
        hidden_states: (total, ...).
        indices: (total,) int64 or int32, from `unpad_input`.

    Returns:
        (batch, seqlen, ...); differentiable.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    try:
        unmet = []
        if indices.shape != hidden_states.shape[:1]:
            total = tuple(hidden_states.shape[:1])
            unmet.append(f"indices must have shape (total,) = {total}, got {tuple(indices.shape)}")
        if indices.dtype not in (torch.int64, torch.int32):
            unmet.append(f"indices must be int64 or int32, got {indices.dtype}")
        if batch < 0 or seqlen < 0:
            unmet.append(f"batch and seqlen must be at least 0, got {batch} and {seqlen}")
        # torch finds no wrong index where there are no rows
        if batch * seqlen == 0 and indices.numel() and not indices.is_meta:
            unmet.append(_within(indices, 0))
        if unmet:
            raise InputError("pad_input", unmet)
        padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
        return padded.index_copy(0, indices.long(), hidden_states).unflatten(0, (batch, seqlen))
    except IndexError:
        raise InputError("pad_input", [_within(indices, batch * seqlen)]) from None
    except Exception as error:
        raise_input_error("pad_input", error, locals(), _PAD_KINDS)


def _within(indices: Tensor, rows: int) -> str:
    given = f"{int(indices.min())} to {int(indices.max())}"
    return f"indices must be in [0, batch * seqlen) = [0, {rows}), got {given}"


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` where each row of the batch is several sequences after one another, with padding at its end.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) integer; its nonzero elements are the lengths of a row's sequences, in
            order: [[2, 3, 0, 0, 0, 0]] has two, and one place of padding.

    Returns:
        hidden_states (total, ...), indices (total,), cu_seqlens (sequences + 1,) int32 and max_seqlen.

    Raises:
        InputError: a ValueError and TypeError that lists every unmet constraint.
    """
    function = "unpad_input_for_concatenated_sequences"
    try:
        lengths = attention_mask_in_length
        if hidden_states.dim() < 2 or lengths.shape != hidden_states.shape[:2]:
            line = (
                "attention_mask_in_length must have shape (batch, seqlen), the first two dimensions of hidden_states "
                f"{tuple(hidden_states.shape)}, got {tuple(lengths.shape)}"
            )
            raise InputError(function, [line])
        seqlen, totals = hidden_states.shape[1], lengths.sum(1, keepdim=True)
        unmet = []
        if wrong := lengths[(lengths < 0) | (lengths > seqlen)].tolist():
            unmet.append(f"attention_mask_in_length must be between 0 and seqlen {seqlen}, got {wrong[0]}")
        elif wrong := totals[totals > seqlen].tolist():  # sums of others may be beyond 64 bits
            unmet.append(f"the lengths of a row must add up to at most seqlen {seqlen}, got {wrong[0]}")
        if unmet:
            raise InputError(function, unmet)
        places = torch.arange(seqlen, device=hidden_states.device)
        packed, indices, *_ = unpad_input(hidden_states, places < totals)
        lengths = lengths[lengths != 0]
        cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return packed, indices, cu_seqlens, int(lengths.max()) if len(lengths) else 0
    except Exception as error:
        raise_input_error(function, error, locals(), _CONCATENATED_KINDS)
