"""The executable specification of attention, in plain torch.

Two things live here. The first half tells how exact attention without an S x S matrix works, one small function per
idea: three ways to a softmax, the merge of two blocks, attention by tiles, and its backward by recomputation;
docs/tour.md walks through them. The second half, `attention` and `attention_varlen`, computes every option of the
public functions directly, with the whole matrix of scores, in float64; autograd gives every gradient. It is what the
tests compare with, and it checks nothing about its arguments: that is the ops' work.

Nothing here needs the compiled libraries, and everything runs on any device.

Layout: q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v (batch, seqlen_k, heads_kv,
head_dim_v), out (batch, seqlen_q, heads, head_dim_v), lse (batch, heads, seqlen_q): the natural logarithm of the sum
of exp(score) over the keys that a row sees. heads is a multiple of heads_kv, and neighbouring query heads share a key
head (arXiv 2305.13245). Row i of seqlen_q lies on the diagonal at key i + shift, shift = seqlen_k - seqlen_q, so that
the last row sees the last key.

The error rule. A kernel in a low precision cannot be held to an absolute number: what is right depends on lengths and
values. It is held to what torch itself loses on the same inputs. With the float64 oracle as the reference::

    max|kernel - reference|  <=  factor * max|torch - reference|  +  rounding of the dtype,

where torch is `attention(..., dtype=q.dtype)`, softmax attention written with torch's own operations in the dtype of
the inputs, and factor is 2, or 3 for gradients and with softcap. `error_bound` computes the right-hand side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reference_dropout import dropout_keep_mask as dropout_keep_mask
from .reference_dropout import philox4x32 as philox4x32

NEGATIVE_INFINITY = float("-inf")

# (left, right): row i sees keys i + shift - left <= j <= i + shift + right. None: no limit. Any integer is allowed.
Window = tuple[int | None, int | None]


# ---- Softmax in three ways, over a memory that counts ---------------------------------------------------------------


class Memory:
    """A row kept in slow memory: elements come and go one at a time, through `load` and `store`, which count.

    data: (..., n). All leading dimensions are rows that take the same steps, and count as one.
    """

    def __init__(self, data: Tensor, count: Counter[str] | None) -> None:
        self.data = data
        self.count: Counter[str] = Counter() if count is None else count

    def __len__(self) -> int:
        return self.data.shape[-1]

    def load(self, j: int) -> Tensor:
        self.count["loads"] += 1
        return self.data[..., j]

    def store(self, j: int, value: Tensor) -> None:
        self.count["stores"] += 1
        self.data[..., j] = value


def naive_softmax(x: Tensor, count: Counter[str] | None = None) -> Tensor:
    """y_j = e^x_j / sum_k e^x_k over the last dimension: arXiv 1805.02867, algorithm 1.

    Two loads and one store per element. Overflows as soon as one e^x_j does. x: (..., n), any floating dtype.
    """
    source, result = Memory(x, count), Memory(torch.empty_like(x), count)
    total = x.new_zeros(x.shape[:-1])
    for j in range(len(source)):
        total = total + source.load(j).exp()
    for j in range(len(source)):
        result.store(j, source.load(j).exp() / total)
    return result.data


def safe_softmax(x: Tensor, count: Counter[str] | None = None) -> Tensor:
    """y_j = e^(x_j - m) / sum_k e^(x_k - m), m = max_k x_k, over the last dimension: arXiv 1805.02867, algorithm 2.

    The same value as the naive one, and no exponent above 0; the maximum costs one more pass: three loads and one
    store per element. This is what torch.softmax computes. x: (..., n), any floating dtype.
    """
    source, result = Memory(x, count), Memory(torch.empty_like(x), count)
    m = x.new_full(x.shape[:-1], NEGATIVE_INFINITY)
    for j in range(len(source)):
        m = torch.maximum(m, source.load(j))
    total = x.new_zeros(x.shape[:-1])
    for j in range(len(source)):
        total = total + (source.load(j) - m).exp()
    for j in range(len(source)):
        result.store(j, (source.load(j) - m).exp() / total)
    return result.data


def online_softmax(x: Tensor, count: Counter[str] | None = None) -> Tensor:
    """The safe softmax with maximum and sum from one pass: arXiv 1805.02867, algorithm 3.

    When the maximum grows from m to m', the sum so far is worth e^(m - m') of what it was: rescale it and go on. Two
    loads and one store per element, as few as the naive one. A row of -inf gives zeros, not NaN: in attention it is a
    row that sees nothing. x: (..., n), any floating dtype.
    """
    source, result = Memory(x, count), Memory(torch.empty_like(x), count)
    m, total = x.new_full(x.shape[:-1], NEGATIVE_INFINITY), x.new_zeros(x.shape[:-1])
    for j in range(len(source)):
        x_j = source.load(j)
        m_new = torch.maximum(m, x_j)
        total = total * (m - _finite(m_new)).exp() + (x_j - _finite(m_new)).exp()
        m = m_new
    for j in range(len(source)):
        result.store(j, (source.load(j) - _finite(m)).exp() * _inverse(total))
    return result.data


class MemoryAccesses(NamedTuple):
    """Accesses to slow memory per element of a row."""

    loads: float
    stores: float

    @property
    def total(self) -> float:
        return self.loads + self.stores


def memory_accesses(softmax: Callable[[Tensor, Counter[str]], Tensor], length: int = 64) -> MemoryAccesses:
    """Runs a softmax of this module on a row of `length` elements and returns the accesses it made per element."""
    count: Counter[str] = Counter()
    softmax(torch.linspace(-1.0, 1.0, length), count)
    return MemoryAccesses(count["loads"] / length, count["stores"] / length)


def _finite(m: Tensor) -> Tensor:
    """A maximum that may be subtracted: a row that has seen nothing has m = -inf, and -inf - -inf would be NaN."""
    return m.masked_fill(torch.isneginf(m), 0.0)


def _inverse(total: Tensor) -> Tensor:
    """1 / total, and 0 for the empty sum, so that a row that sees nothing comes out as zeros."""
    empty = total == 0
    return (1 / total.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


# ---- Attention in pieces --------------------------------------------------------------------------------------------


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins the attention of the same rows over two disjoint sets of keys into that over both::

        lse = log(e^lse_a + e^lse_b),    out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

    arXiv 1805.02867, section 3.1, with value rows attached: associative and commutative, and (0, -inf) is its neutral
    element. Key tiles, split keys and ring attention (arXiv 2310.01889) are all this one operation.

    out: (batch, seqlen, heads, head_dim_v) or packed (total, heads, head_dim_v); lse: (batch, heads, seqlen) or
    (heads, total). Returns (out, lse). Differentiable in all four.
    """
    # The result does not depend on m (it cancels), so that no gradient needs to go through it.
    m = _finite(torch.maximum(lse_a, lse_b)).detach()
    weight_a, weight_b = (lse_a - m).exp(), (lse_b - m).exp()
    total = weight_a + weight_b
    empty = total == 0
    lse = (m + total.masked_fill(empty, 1.0).log()).masked_fill(empty, NEGATIVE_INFINITY)
    share_a, share_b = ((w * _inverse(total)).transpose(-1, -2).unsqueeze(-1) for w in (weight_a, weight_b))
    return share_a * out_a + share_b * out_b, lse


@dataclass
class RowState:
    """What a block of rows knows after some of its keys: maximum, sum and weighted values, relative to the maximum."""

    row_max: Tensor  # (..., rows, 1)           m   = max score
    row_sum: Tensor  # (..., rows, 1)           l   = sum e^(score - m)
    acc: Tensor  # (..., rows, head_dim_v)      acc = sum e^(score - m) v

    @classmethod
    def empty(cls, q: Tensor, head_dim_v: int) -> RowState:
        """The state of the rows of q (..., rows, head_dim) before their first key."""
        zeros = q.new_zeros(*q.shape[:-1], 1)
        return cls(zeros + NEGATIVE_INFINITY, zeros, q.new_zeros(*q.shape[:-1], head_dim_v))

    def update(self, scores: Tensor, v: Tensor) -> None:
        """Takes in one more tile of keys: scores (..., rows, cols), v (..., cols, head_dim_v)."""
        row_max = torch.maximum(self.row_max, scores.amax(-1, keepdim=True))
        correction = (self.row_max - _finite(row_max)).exp()
        p = (scores - _finite(row_max)).exp()
        self.row_sum = correction * self.row_sum + p.sum(-1, keepdim=True)
        self.acc = correction * self.acc + p @ v
        self.row_max = row_max

    def finish(self) -> tuple[Tensor, Tensor]:
        """out (..., rows, head_dim_v) and lse (..., rows): the one division, left to the end."""
        return self.acc * _inverse(self.row_sum), (self.row_max + self.row_sum.log()).squeeze(-1)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor]:
    """Attention that never holds more than a tile of scores: arXiv 2205.14135, algorithm 1.

    Loops in the order of arXiv 2307.08691, algorithm 1: rows outside, keys inside, normalised once at the end. Tiles
    that no row sees are skipped. Computes in the dtype of q; layout of the module. Returns (out, lse).
    """
    scale = _softmax_scale(softmax_scale, q)
    window, shift = _window(causal, window_size), k.shape[1] - q.shape[1]
    q, k, v = by_head(q, k, v)
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1])
    for rows in _blocks(q.shape[-2], block_q):
        q_tile = q[..., rows, :]
        state = RowState.empty(q_tile, v.shape[-1])
        for cols in _blocks(k.shape[-2], block_k):
            visible = _visible_tile(rows, cols, shift, window, q.device)
            if visible is None:
                continue
            scores = scale * (q_tile @ k[..., cols, :].transpose(-1, -2))
            state.update(scores.masked_fill(~visible, NEGATIVE_INFINITY), v[..., cols, :])
        out[..., rows, :], lse[..., rows] = state.finish()
    return out.transpose(1, 2), lse


def tiled_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tiled_attention from out and lse alone: arXiv 2205.14135, algorithm 4; 2307.08691, algorithm 2.

    The probabilities are not stored but computed again, a tile at a time, P = e^(scores - lse), and then::

        dV = P^T dO,   dP = dO V^T,   dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,
        delta_i = sum_d dO_id O_id - dlse_i

    dout: like out; dlse: like lse, the gradient that comes through lse, where it is used. Returns (dq, dk, dv).
    """
    scale = _softmax_scale(softmax_scale, q)
    window, shift = _window(causal, window_size), k.shape[1] - q.shape[1]
    batch, _, heads, _ = q.shape
    heads_kv = k.shape[2]
    q, k, v = by_head(q, k, v)
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    delta = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for cols in _blocks(k.shape[-2], block_k):
        k_tile, v_tile = k[..., cols, :], v[..., cols, :]
        for rows in _blocks(q.shape[-2], block_q):
            visible = _visible_tile(rows, cols, shift, window, q.device)
            if visible is None:
                continue
            q_tile, dout_tile = q[..., rows, :], dout[..., rows, :]
            scores = (scale * (q_tile @ k_tile.transpose(-1, -2))).masked_fill(~visible, NEGATIVE_INFINITY)
            p = (scores - _finite(lse[..., rows, None])).exp()
            dp = dout_tile @ v_tile.transpose(-1, -2)
            ds = p * (dp - delta[..., rows, None])
            dv[..., cols, :] += p.transpose(-1, -2) @ dout_tile
            dq[..., rows, :] += scale * (ds @ k_tile)
            dk[..., cols, :] += scale * (ds.transpose(-1, -2) @ q_tile)
    # A key head gathers the gradients of all the query heads that share it.
    dk, dv = (t.reshape(batch, heads_kv, heads // max(heads_kv, 1), *t.shape[2:]).sum(2) for t in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _softmax_scale(softmax_scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale


def by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, seqlen, heads, dim) to (batch, heads, seqlen, dim), with a key head for every query head."""
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _window(causal: bool, window_size: tuple[int, int]) -> Window:
    """The public convention, where -1 is no limit and causal order is a right side of 0."""
    left, right = (None if side == -1 else side for side in window_size)
    return left, 0 if causal else right


def in_window(offset: Tensor, window: Window) -> Tensor:
    """Whether a score counts that lies `offset` keys right of the diagonal (negative: left of it)."""
    left, right = window
    inside = torch.ones_like(offset, dtype=torch.bool)
    if left is not None:
        inside &= offset >= -left
    if right is not None:
        inside &= offset <= right
    return inside


def _visible_tile(rows: slice, cols: slice, shift: int, window: Window, device: torch.device) -> Tensor | None:
    """Which scores of a tile count (rows, cols), or None where none of them can: the tile is skipped.

    The offsets of a tile from the diagonal are one interval; two comparisons tell whether it misses the window.
    """
    left, right = window
    first, last = cols.start - (rows.stop - 1 + shift), cols.stop - 1 - (rows.start + shift)
    if (left is not None and last < -left) or (right is not None and first > right):
        return None
    row = torch.arange(rows.start, rows.stop, device=device)
    col = torch.arange(cols.start, cols.stop, device=device)
    return in_window(col - (row[:, None] + shift), window)


# ---- The oracle -----------------------------------------------------------------------------------------------------


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
    rng_state: Tensor | None = None,
    dropout_keep: Tensor | None = None,
    window: Window | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores) v with every option of the public `attention`, written out: arXiv 1706.03762, equation 1::

        score = softcap tanh(scale q.k / softcap)                arXiv 2408.00118, section 2 (softcap 0: scale q.k)
              - slope |i + shift - j|                            ALiBi, arXiv 2108.12409, section 3
              + bias                                             -inf hides the key
        P = e^score / (e^sink + sum over the visible keys of e^score),    out = dropout(P) v

    Returns out (batch, seqlen_q, heads, head_dim_v), or (out, lse) with return_lse. A row that sees nothing gives
    out 0, lse -inf (with a sink: lse = sink) and gradients 0, never NaN. Layout of the module.

    Args:
        causal, window_size: row i sees i + shift - left <= j <= i + shift + right; -1 is no limit, causal: right 0.
        window: (left, right) with None for no limit and any integers, instead of both; right = seqlen_q - seqlen_k is
            torch's causal order, aligned to the top left.
        bias, mask: broadcast to (batch, heads, seqlen_q, seqlen_k); mask is bool, True = attend.
        alibi_slopes: (heads,) or (batch, heads).
        sinks: (heads,) logits that take a share and have no value.
        seqused_q, seqused_k: (batch,) rows and keys in use; the diagonal follows them, and what lies beyond is never
            seen: those rows give out 0, lse -inf, and all gradients there are 0.
        dropout_p: dropped after the normalisation (lse unchanged) by the bits of rng_state, or by dropout_keep (True =
            kept, broadcast like mask); what is kept is scaled by 1 / (1 - dropout_p).
        deterministic: taken so that one set of options serves the public function and this one, which always is.
        dtype: of computation and result. float64 is the oracle. With q.dtype it is torch's own attention in that type:
            products, scores and probabilities rounded to it; wider options promote as in torch. lse: float32 or more.
    """
    del deterministic
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    if window is None:
        window = _window(causal, window_size)

    length_q, length_k = _lengths(seqused_q, q), _lengths(seqused_k, k)  # (batch, 1, 1, 1)
    row = torch.arange(seqlen_q, device=q.device)[:, None]
    col = torch.arange(seqlen_k, device=q.device)
    offset = col - (row + length_k - length_q)  # (batch, 1, seqlen_q, seqlen_k): keys right of the diagonal
    row_used, key_used = row < length_q, col < length_k  # (batch, 1, seqlen_q, 1) and (batch, 1, 1, seqlen_k)
    visible = row_used & key_used & in_window(offset, window)
    if mask is not None:
        visible = visible & mask

    # Whatever lies beyond the lengths, NaN included, must not reach the products: 0 * NaN is NaN.
    q, k, v = (t.to(dtype) for t in by_head(q, k, v))
    q = q.masked_fill(~row_used, 0.0)
    k, v = (t.masked_fill(~key_used.transpose(-1, -2), 0.0) for t in (k, v))

    scores = (q * _softmax_scale(softmax_scale, q)) @ k.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = _at_least(alibi_slopes, dtype).expand(batch, heads)
        scores = scores - slopes[..., None, None] * offset.abs()
    if bias is not None:
        scores = scores + _at_least(bias, dtype)
    scores = scores.masked_fill(~visible, NEGATIVE_INFINITY)
    hidden = torch.isneginf(scores)

    # The sink is one more column, without a value; no sink is a column that nobody sees. Rows of -inf alone have no
    # softmax: they compute with zeros, and their results are replaced afterwards, so that autograd meets no NaN.
    sink = scores.new_full((heads,), NEGATIVE_INFINITY) if sinks is None else _at_least(sinks, dtype)
    sink_column = sink[:, None, None].expand(batch, heads, seqlen_q, 1).masked_fill(~row_used, NEGATIVE_INFINITY)
    logits = torch.cat((scores, sink_column), -1)
    empty = torch.isneginf(logits).all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    p = torch.softmax(logits, -1)[..., :-1].masked_fill(hidden, 0.0)
    lse = _at_least(logits, torch.float32).logsumexp(-1).masked_fill(empty.squeeze(-1), NEGATIVE_INFINITY)

    if dropout_p > 0:
        if dropout_keep is None:
            if rng_state is None:
                raise ValueError("dropout_p > 0 needs rng_state or dropout_keep")
            dropout_keep = dropout_keep_mask(rng_state, batch, heads, seqlen_q, seqlen_k, dropout_p)
        p = p * (1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0) * dropout_keep
    out = (p.to(dtype) @ v).transpose(1, 2)
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
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    rng_state: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over packed sequences, one after the other.

    q: (total_q, heads, head_dim), k, v: (total_k, heads_kv, ...); sequence b holds rows cu_seqlens_q[b] to
    cu_seqlens_q[b + 1] and keys cu_seqlens_k[b] to cu_seqlens_k[b + 1] (cu_seqlens_k None: the same as cu_seqlens_q).
    Rows and columns of bias, mask and dropout count from the start of the sequence. max_seqlen_* are hints, and
    nothing here needs a hint; the other options are those of `attention`.
    Returns out (total_q, heads, head_dim_v), or (out, lse) with lse (heads, total_q); a row of no sequence gives 0
    and -inf.
    """
    del max_seqlen_q, max_seqlen_k
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    batch, heads = len(lengths_q), q.shape[1]
    keep = None
    if dropout_p > 0 and rng_state is not None:
        longest = max(lengths_q, default=0), max(lengths_k, default=0)
        keep = dropout_keep_mask(rng_state, batch, heads, *longest, dropout_p)

    def of_sequence(matrix: Tensor | None, b: int) -> Tensor | None:
        """The part of a (batch, heads, rows, columns) matrix that belongs to sequence b; sizes of 1 broadcast."""
        if matrix is None:
            return None
        matrix = matrix[(None,) * (4 - matrix.dim())]
        matrix = matrix[b : b + 1] if matrix.shape[0] > 1 else matrix
        return fitted(matrix, lengths_q[b], lengths_k[b])

    results = [
        attention(
            q[None, starts_q[b] : starts_q[b + 1]],
            k[None, starts_k[b] : starts_k[b + 1]],
            v[None, starts_k[b] : starts_k[b + 1]],
            bias=of_sequence(bias, b),
            mask=of_sequence(mask, b),
            alibi_slopes=None if alibi_slopes is None else alibi_slopes.expand(batch, heads)[b],
            dropout_p=dropout_p,
            seqused_q=None if seqused_q is None else seqused_q[b : b + 1],
            seqused_k=None if seqused_k is None else seqused_k[b : b + 1],
            return_lse=True,
            dropout_keep=of_sequence(keep, b),
            dtype=dtype,
            **options,
        )
        for b in range(batch)
    ]
    # Rows after the last sequence belong to none: a sequence of them that sees no key.
    results.append(attention(q[None, starts_q[-1] :], k[None, :0], v[None, :0], return_lse=True, dtype=dtype))
    out = torch.cat([out[0] for out, _ in results], 0)
    lse = torch.cat([lse[0] for _, lse in results], -1)
    return (out, lse) if return_lse else out


def fitted(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A (batch, heads, rows, columns) matrix of a sequence's rows and columns; sizes of 1 broadcast.

    One that covers no more than what is in use of them gets zeros for the rest.
    """
    sizes = zip(matrix.shape[2:], (rows, columns), strict=True)
    more_rows, more_columns = (length - size if size > 1 else 0 for size, length in sizes)
    return pad(matrix, (0, more_columns, 0, more_rows))


def _lengths(seqused: Tensor | None, t: Tensor) -> Tensor:
    """(batch, 1, 1, 1) rows in use of t (batch, seqlen, ...), never more than it holds."""
    batch, seqlen = t.shape[:2]
    used = torch.full((batch,), seqlen, device=t.device) if seqused is None else seqused.long().clamp(0, seqlen)
    return used[:, None, None, None]


def _at_least(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(torch.promote_types(t.dtype, dtype))


# ---- The error rule -------------------------------------------------------------------------------------------------


def error_bound(reference: Tensor, low_precision: Tensor, dtype: torch.dtype, factor: float = 2.0) -> float:
    """The largest error that the rule at the top of this module allows a kernel whose results are in dtype::

        factor * max|low_precision - reference|  +  2 * max|(r + 0.3 - 0.3) - r|,   r = reference rounded to dtype

    reference: the float64 result; low_precision: torch's on the same inputs. Above float64 there is no precision to
    measure it against: there low_precision is torch's float32 result, and its error is scaled by the ratio of the
    two machine epsilons. Elements whose reference is not finite (lse of rows that see nothing) are left out: compare
    those for equality. Raises ValueError where the low-precision result is not finite and the reference is: a bound
    of infinity would let everything pass.
    """
    finite = torch.isfinite(reference)
    r = reference.detach()[finite].double()
    if r.numel() == 0:
        return 0.0
    error = (low_precision.detach()[finite].double() - r).abs().max().item()
    if not math.isfinite(error):
        raise ValueError("error_bound: low_precision must be finite wherever reference is; the inputs overflow in it")
    if dtype == torch.float64:
        error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    r = r.to(dtype)
    rounding = ((r + 0.3 - 0.3) - r).abs().max().item()
    return factor * error + 2 * rounding
