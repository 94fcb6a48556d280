"""The bits of dropout, in plain torch: what csrc/core/philox.h specifies, for `reference` and the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-7: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.

    counter: (..., 4), key: (..., 2), int64 tensors of 32-bit words that broadcast. Returns (..., 4) such words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(7):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two words, in halves of b, so that int64 never overflows."""
    lower = a * (b & 0xFFFF)
    upper = a * (b >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def _dropout_values(words: Tensor) -> Tensor:
    """The 15 bits of the sixteen elements that a call of Philox serves: (..., 4) words to (..., 2, 2, 2, 2), int64.

    The axes are column / 8 % 2 and row / 8 % 2, which number a word; row % 2, its half; column % 2, the byte in that.
    An element's number is the lower seven bits of its byte, then those of a tie byte. Of a row parity there are eight
    bytes, p[0..3] in words 0 and 1 and q[0..3] in words 2 and 3: the tie of p[b] is p[b + 1] ^ q[b + 1], that of q[b]
    is p[b + 1] ^ q[b + 3], modulo 4. So any two elements' four bytes are independent.
    """
    own = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], -1)
    p, q = own.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).transpose(-3, -2).unbind(-4)  # by row parity, word, column
    p_tie, q_tie = ((p ^ x).flatten(-2).roll(-1, -1).reshape(p.shape) for x in (q, q.roll(1, -2)))
    values = [(x & 0x7F) << 8 | tie for x, tie in ((p, p_tie), (q, q_tie))]
    return torch.stack(values, -4).transpose(-3, -2)


def dropout_keep_mask(
    rng_state: Tensor,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    *,
    first_batch: int = 0,
    first_key: int = 0,
) -> Tensor:
    """Which probabilities dropout keeps: bool (batch, heads, seqlen_q, seqlen_k), True = kept.

    A pure function of (seed, offset, batch, head, row, column), whatever the tiling: csrc/core/philox.h says how the
    bits are numbered. Each element has 15 bits and is dropped when they are below dropout_p, rounded to 2^-15.
    rng_state: int64 (2,), seed and offset. The part that is wanted begins at first_batch and first_key, 16 times n.
    """
    seed, offset = rng_state.unbind()
    # A block of 16 x 16 elements takes 4 x 4 calls, each of which serves rows {r, r + 1, r + 8, r + 9} by columns {c,
    # c + 1, c + 8, c + 9}, r and c even.
    blocks_q, blocks_k = (seqlen_q + 15) // 16, (seqlen_k + 15) // 16
    ranges = (torch.arange(n, device=rng_state.device) for n in (batch * heads, blocks_q * 4, blocks_k * 4))
    batch_head, row, col = torch.meshgrid(*ranges, indexing="ij")
    place = (col + first_key // 4, row, batch_head + first_batch * heads, (offset & _WORD).expand_as(col))
    words = philox4x32(torch.stack(place, -1), torch.stack((seed & _WORD, (seed >> 32) & _WORD)))
    bits = _dropout_values(words).reshape(batch * heads, blocks_q, 4, blocks_k, 4, 2, 2, 2, 2)
    # By head; row / 16, row / 8 % 2, row / 2 % 4, row % 2; the same of the column.
    bits = bits.permute(0, 1, 6, 2, 7, 3, 5, 4, 8)
    keep = bits.reshape(batch, heads, blocks_q * 16, blocks_k * 16) >= math.floor(dropout_p * 2**15 + 0.5)
    return keep[:, :, :seqlen_q, :seqlen_k]
