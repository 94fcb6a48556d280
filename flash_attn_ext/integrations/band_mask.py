"""BandMask: a boolean attention mask that is described instead of stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


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
    """(batch, seqlen_k) bool: True = a token."""
    starts: Tensor | None = None
    """(batch, seqlen) bool: where one of several packed sequences starts."""

    @property
    def window(self) -> tuple[int | None, int | None]:
        """(left, right) as the ops count them: from the diagonal that ends in the bottom right corner."""
        moved = self.shift - (self.seqlen_k - self.seqlen_q)
        left = None if self.left is None else self.left - moved
        return left, None if self.right is None else self.right + moved

    @property
    def is_written_out(self) -> bool:
        """Whether `dense` was asked for: code outside may then have written into it, so that it is what counts."""
        return "dense" in self.__dict__

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """(sequences + 1,) int32: where the packed sequences start in (batch * seqlen); a sequence ends with its row of
        the batch."""
        if self.starts is None:
            return None
        starts = self.starts.clone()
        starts[:, 0] = True
        end = torch.tensor([starts.numel()], device=self.device)
        return torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)

    @cached_property
    def lengths(self) -> Tensor | None:
        """(batch,) int32: keys per sequence, where the padding is to the right of them; None where it is not."""
        if self.padding is None:
            return None
        lengths = self.padding.sum(1, dtype=torch.int32)
        columns = torch.arange(self.seqlen_k, device=self.device)
        return lengths if bool((self.padding == (columns < lengths[:, None])).all()) else None

    @cached_property
    def dense(self) -> Tensor:
        """(batch, 1, seqlen_q, seqlen_k) bool."""
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


class BandMask(Tensor):
    """A boolean tensor (batch, 1, seqlen_q, seqlen_k), True = attend, that has a shape and a `Band` but no memory.

    Attention reads the band. Any operation of torch on it works on the mask written out, and its result is an ordinary
    tensor: code that slices a mask, or adds to it, gets what it would get from the mask itself.
    """

    band: Band

    @staticmethod
    def __new__(cls, band: Band) -> BandMask:
        shape = (band.batch, 1, band.seqlen_q, band.seqlen_k)
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=band.device)
        mask.band = band
        return mask

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BandMask({self.band})"

    # Only what reaches the dispatcher is of interest.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # what gradient checkpointing does to every argument
            return cls(args[0].band)
        args, kwargs = tree_map(lambda x: x.band.dense if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)
