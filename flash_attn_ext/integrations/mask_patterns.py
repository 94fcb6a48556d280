"""Recognises the masks that transformers asks for as bands.

The library describes a mask by a function of (batch, head, row, key), put together from a few factories of
transformers.masking_utils. Functions that come from these factories are recognised by their code, and their parameters
read from their closures. Each factory is tried once beside what it is taken for: one that has changed its meaning in
some future version is not recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils

from .masks import Band

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """What a mask function lets a row see. Each field is a condition, None is none; all hold."""

    left: int | None = None
    right: int | None = None
    chunk: tuple[int, Tensor] | None = None
    """(size, left_padding (batch,)): chunks of this size, counted from left_padding."""
    packed: Tensor | None = None
    """(batch, seqlen): the number of the packed sequence."""
    positions: Tensor | None = None
    """(batch, seqlen): what the other conditions count in, instead of the place in the batch."""


def band_of_call(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **_: Any,
) -> Band | None:
    """The mask that a call of masking_utils.sdpa_mask with the same arguments would write out; None: not a band.

    attention_mask: (batch, any length), nonzero = a token; keys beyond it are none.
    """
    if cache_position is not None:  # transformers 4 gives this instead of q_length, q_offset and device
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    q_offset, kv_offset, device = int(q_offset), int(kv_offset), torch.device(device)
    pattern = _pattern(mask_function)
    if pattern is None or (pattern.positions is not None and pattern.packed is None):
        return None
    padding = starts = None
    if attention_mask is not None:
        end = kv_offset + kv_length
        padding = pad(attention_mask.bool(), (0, max(end - attention_mask.shape[1], 0)))[:, kv_offset:end]
        padding = None if bool(padding.all()) else padding.expand(batch_size, -1)
    if pattern.packed is not None or pattern.chunk is not None:
        if q_length != kv_length or q_offset != 0 or kv_offset != 0:
            return None
        starts = _starts(pattern, torch.arange(q_length, device=device)[None])
        if starts is None:
            return None
        starts = starts.expand(batch_size, -1) if bool(starts[:, 1:].any()) else None
    shift = q_offset - kv_offset
    return Band(batch_size, q_length, kv_length, device, pattern.left, pattern.right, shift, padding, starts)


def _starts(pattern: Pattern, places: Tensor) -> Tensor | None:
    """(batch or 1, seqlen) bool: where a row sees nothing before it. None: chunks that are not counted from 0."""
    starts = places == 0
    if pattern.packed is not None:
        starts = starts | (pattern.packed.diff(dim=1, prepend=pattern.packed[:, :1]) != 0)
    if pattern.chunk is not None:
        size, left_padding = pattern.chunk
        if bool((left_padding != 0).any()):
            return None
        places = places if pattern.positions is None else pattern.positions
        starts = starts | (places % size == 0)
    return starts


def _pattern(function: MaskFunction) -> Pattern | None:
    if function in _CONSTANT:
        return _CONSTANT[function]
    code = getattr(function, "__code__", None)
    if code is None or code not in _FACTORIES:
        return None
    contents = [cell.cell_contents for cell in function.__closure__ or ()]
    return _FACTORIES[code](**dict(zip(code.co_freevars, contents, strict=True)))


def _all_of(mask_functions: tuple[MaskFunction, ...]) -> Pattern | None:
    """The conditions of all; None where one is not recognised, or two of them are of one kind."""
    conditions: dict[str, Any] = {}
    for pattern in map(_pattern, mask_functions):
        if pattern is None:
            return None
        given = {f.name: getattr(pattern, f.name) for f in fields(Pattern) if getattr(pattern, f.name) is not None}
        if given.keys() & conditions.keys():
            return None
        conditions |= given
    return Pattern(**conditions)


def _remapped(mask_function: MaskFunction, position_ids: Tensor) -> Pattern | None:
    pattern = _pattern(mask_function)
    return None if pattern is None else Pattern(pattern.left, pattern.right, pattern.chunk, None, position_ids)


_CONSTANT: dict[MaskFunction, Pattern] = {masking_utils.causal_mask_function: Pattern(right=0)}
if hasattr(masking_utils, "bidirectional_mask_function"):  # not in transformers 4
    _CONSTANT[masking_utils.bidirectional_mask_function] = Pattern()

# Readers of closures, by the code of the functions that the factories return. The arguments are the closures' names.
_FACTORIES: dict[object, Callable[..., Pattern | None]] = {}


def _learn() -> None:
    sequences, positions = torch.tensor([[0, 0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    no_padding = torch.zeros(1, dtype=torch.int64)
    causal = masking_utils.causal_mask_function
    # By name, as not every version has all: arguments to try the factory with, and the reader of what it returns.
    known: dict[str, tuple[tuple[Any, ...], Callable[..., Pattern | None]]] = {
        "and_masks": ((causal,), _all_of),
        "sliding_window_overlay": ((3,), lambda sliding_window: Pattern(sliding_window - 1)),
        "sliding_window_bidirectional_overlay": ((2,), lambda sliding_window: Pattern(sliding_window, sliding_window)),
        "chunked_overlay": (
            (3, no_padding),
            lambda chunk_size, left_padding: Pattern(chunk=(chunk_size, left_padding)),
        ),
        "packed_sequence_mask_function": (
            (sequences,),
            lambda packed_sequence_mask: Pattern(packed=packed_sequence_mask),
        ),
        "remap_positions_for_packed_sequence": ((causal, positions), _remapped),
    }
    for name, (arguments, reader) in known.items():
        factory = getattr(masking_utils, name, None)
        if factory is None:
            continue
        function = factory(*arguments)
        _FACTORIES[function.__code__] = reader
        trial = (
            function
            if reader is not _remapped
            else masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(sequences))
        )
        if not _is_what_it_is_taken_for(trial, sequences.shape[1]):
            del _FACTORIES[function.__code__]


def _is_what_it_is_taken_for(function: MaskFunction, seqlen: int) -> bool:
    place = torch.arange(seqlen)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    try:
        band = band_of_call(batch_size=1, q_length=seqlen, kv_length=seqlen, mask_function=function)
        expected = function(zero, zero, place[:, None], place)
    except (TypeError, ValueError, RuntimeError, IndexError):  # other names in the closure, other arguments
        return False
    return band is not None and torch.equal(band.dense(), expected.expand(1, 1, seqlen, seqlen))


_learn()
