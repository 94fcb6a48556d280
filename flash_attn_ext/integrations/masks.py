"""AttentionMask: a boolean attention mask that is described, where it can be, instead of stored."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten


@dataclass(frozen=True)
class Band:
    """Row i sees key j of its batch where all of this holds; None is no limit.

    i + shift - left <= j <= i + shift + right
    padding[batch, j]
    i and j, places in the same sequence of tokens, lie between the same two starts[batch]
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    device: torch.device
    left: int | None = None
    right: int | None = None
    shift: int = 0
    padding: Tensor | None = None
    """(batch, seqlen_k) bool, True = a token."""
    starts: Tensor | None = None
    """(batch, seqlen) bool, True where one of several packed sequences starts."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the mask written out."""
        return self.batch, 1, self.seqlen_q, self.seqlen_k

    @property
    def window(self) -> tuple[int | None, int | None]:
        """(left, right) as the ops count them, from the diagonal that ends in the bottom right corner."""
        moved = self.shift - (self.seqlen_k - self.seqlen_q)
        left = None if self.left is None else self.left - moved
        return left, None if self.right is None else self.right + moved

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(sequences + 1,) int32, where the packed sequences start in (batch * seqlen), and the end."""
        assert self.starts is not None
        starts = self.starts.clone()
        starts[:, 0] = True
        end = torch.tensor([starts.numel()], device=self.device)
        return torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)

    @cached_property
    def lengths(self) -> Tensor | None:
        """(batch,) int32, keys per sequence, where the padding is to the right of them; None where it is not."""
        if self.padding is None:
            return None
        lengths = self.padding.sum(1, dtype=torch.int32)
        columns = torch.arange(self.seqlen_k, device=self.device)
        return lengths if bool((self.padding == (columns < lengths[:, None])).all()) else None

    def dense(self) -> Tensor:
        """(batch, 1, seqlen_q, seqlen_k) bool, written out."""
        row = torch.arange(self.seqlen_q, device=self.device)[:, None] + self.shift
        key = torch.arange(self.seqlen_k, device=self.device)
        mask = torch.ones(1, 1, self.seqlen_q, self.seqlen_k, dtype=torch.bool, device=self.device)
        if self.left is not None:
            mask = mask & (key >= row - self.left)
        if self.right is not None:
            mask = mask & (key <= row + self.right)
        if self.padding is not None:
            mask = mask & self.padding[:, None, None]
        if self.starts is not None:
            sequence = self.starts.cumsum(1)
            mask = mask & (sequence[:, None, :, None] == sequence[:, None, None])
        return mask.expand(self.batch, -1, -1, -1)


class AttentionMask(Tensor):
    """A boolean tensor (batch, 1, seqlen_q, seqlen_k), True = attend. One that is a band has a shape, but no memory.

    Attention reads the band. Operations of torch work on the mask written out, and give ordinary tensors: code that
    slices a mask gets what it would get from the mask itself. Two are different, for the code of models that expects
    masks which are added to scores: adding it to floating numbers adds 0 and the least number of their dtype, and
    turning it into floating numbers is an error, as they could be meant either way.
    """

    _band: Band | None
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, mask: Band | Tensor) -> AttentionMask:
        """mask: a band, or a boolean tensor."""
        self = Tensor._make_wrapper_subclass(cls, mask.shape, dtype=torch.bool, device=mask.device)
        self._band, self._dense = (mask, None) if isinstance(mask, Band) else (None, mask)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionMask:
        """Not torch's, which copies a storage."""
        copied = AttentionMask(deepcopy(self.dense if self.band is None else self.band, memo))
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AttentionMask({self._dense if self._dense is not None else self._band})"

    @property
    def band(self) -> Band | None:
        """None where it is not a band, or was written out, so that code outside may have written into it."""
        return self._band if self._dense is None else None

    @property
    def dense(self) -> Tensor:
        """The mask written out; the same tensor every time."""
        if self._dense is None:
            assert self._band is not None
            self._dense = self._band.dense()
        return self._dense

    # Only what reaches the dispatcher is of interest.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is aten.detach.default:  # what gradient checkpointing does to every argument
            mask = args[0]
            return cls(mask.dense if mask.band is None else mask.band)
        if func is aten._to_copy.default and (kwargs.get("dtype") or torch.bool).is_floating_point:
            raise TypeError(
                "flash_attn_ext: a boolean attention mask (True = attend) must not be turned into floating numbers; "
                "code that does this expects a mask of another kind: use attn_implementation='eager'"
            )
        floating = [x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        added_to = floating[0] if floating and func in (aten.add.Tensor, aten.add_.Tensor) else None

        def written_out(x: Any) -> Any:
            if not isinstance(x, cls):
                return x
            if added_to is None:
                return x.dense
            scores = torch.zeros(x.shape, dtype=added_to, device=x.device)
            return scores.masked_fill(~x.dense, torch.finfo(added_to).min)

        args, kwargs = tree_map(written_out, (args, kwargs))
        return func(*args, **kwargs)
