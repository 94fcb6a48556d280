"""torch.distributed.tensor: `register` tells DTensor how the ops may be sharded, so that `attention` takes DTensors.

Attention is independent for every sequence of the batch and for every head: shards of either are computed without
communication, what is replicated or sharded otherwise is redistributed. Dropout takes no sharded DTensor, as its random
bits are numbered by the places in the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..ops import OPTIONAL_TENSORS, ops

_NUMBERS = 8  # numeric arguments of the op forward, after the tensors

_registered = False
# Placements of the outputs, and of the arguments (None: not a tensor).
Sharding = tuple[list[Any], list[Any]]


def register() -> None:
    """Registers batch and head sharding for forward, backward, merge and softmax. Once in every process.

    From then on integrations.sdpa takes DTensors too.
    """
    register_sharding(ops.forward.default)(_forward)
    register_sharding(ops.backward.default)(_backward)
    register_sharding([ops.merge.default, ops.merge_backward.default])(_merge)
    register_sharding([ops.softmax.default, ops.softmax_backward.default])(_softmax)
    global _registered
    _registered = True


def active() -> tuple[str, ...]:
    """What DTensor has been told; nothing before `register`."""
    return ("how DTensor shards the ops flash_attn_ext::*",) if _registered else ()


def _forward(q: Any, k: Any, v: Any, *options: Any) -> list[Sharding]:
    shardings = []
    for kind in _kinds(q, k, options):
        rows, stats = _rows(kind, q), _stats(kind, q)
        inputs = [rows] * 3 + _options(kind, options)
        shardings.append(([rows, stats], inputs))
    return shardings


def _backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *options: Any) -> list[Sharding]:
    *options_of_forward, _deterministic, bias_requires_grad = options
    given = dict(zip(OPTIONAL_TENSORS, options, strict=False))
    shardings = []
    for kind in _kinds(q, k, options):
        rows, stats = _rows(kind, q), _stats(kind, q)
        tensors = _options(kind, options_of_forward)
        dbias = _gradient(tensors[0], kind) if bias_requires_grad else Replicate()
        dsinks = _gradient(tensors[3], kind) if given["sinks"] is not None else Replicate()
        inputs = [rows, None if dlse is None else stats, rows, rows, rows, rows, stats, *tensors, None, None]
        shardings.append(([rows, rows, rows, dbias, dsinks], inputs))
    return shardings


def _kinds(q: Any, k: Any, options: Sequence[Any]) -> list[str]:
    """Ways to shard: not at all, by batch, by heads. Dropout: not at all."""
    given = dict(zip(OPTIONAL_TENSORS, options, strict=False))
    if given["rng_state"] is not None:
        return ["replicate"]
    heads_kv = k.shape[-2]
    # Shards of unequal size would tear query heads from their key head.
    by_heads = ["heads"] if heads_kv % q.mesh.size() == 0 else []
    by_batch = ["batch"] if given["cu_seqlens_q"] is None else []
    return ["replicate", *by_batch, *by_heads]


def _rows(kind: str, q: Any) -> Any:
    """q, k, v, out and their gradients: (batch, seqlen, heads, dim) or (total, heads, dim)."""
    return {"replicate": Replicate(), "batch": Shard(0), "heads": Shard(len(q.shape) - 2)}[kind]


def _stats(kind: str, q: Any) -> Any:
    """lse and its gradient: (batch, heads, seqlen) or (heads, total)."""
    return {"replicate": Replicate(), "batch": Shard(0), "heads": Shard(len(q.shape) - 3)}[kind]


def _options(kind: str, options: Sequence[Any]) -> list[Any]:
    """The arguments of the op forward after q, k and v."""
    placements: list[Any] = []
    for name, x in zip(OPTIONAL_TENSORS, options, strict=False):
        if x is None:
            placements.append(None)
        elif kind == "replicate":
            placements.append(Replicate())
        elif name in ("bias", "mask"):
            dim = 0 if kind == "batch" else 1
            placements.append(Shard(dim) if x.shape[dim] > 1 else Replicate())
        elif name in ("alibi_slopes", "sinks"):
            batch_dims = len(x.shape) - 1
            sharded = kind == "heads" or batch_dims
            placements.append(Shard(batch_dims if kind == "heads" else 0) if sharded else Replicate())
        else:  # lengths
            placements.append(Shard(0) if kind == "batch" else Replicate())
    return [*placements, *[None] * _NUMBERS]


def _gradient(placement: Any, kind: str) -> Any:
    """Of an input that every shard has seen, each has a part of the gradient."""
    return Partial() if kind != "replicate" and placement == Replicate() else placement


def _merge(*tensors: Any) -> list[Sharding]:
    """For merge and its backward, whose arguments and results are outs and lses in turn."""
    rank = len(tensors[0].shape)
    shardings = [(Replicate(), Replicate()), (Shard(rank - 2), Shard(rank - 3))]
    if rank == 4:
        shardings.append((Shard(0), Shard(0)))
    outputs = 2 if len(tensors) == 4 else 4
    return [(list(pair) * (outputs // 2), list(pair) * (len(tensors) // 2)) for pair in shardings]


def _softmax(*tensors: Any) -> list[Sharding]:
    placements = [Replicate(), *(Shard(dim) for dim in range(len(tensors[0].shape) - 1))]
    return [([placement], [placement] * len(tensors)) for placement in placements]
