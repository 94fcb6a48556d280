"""Two processes over gloo: DDP, FSDP2 and DTensor give what one process gives."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import flash_attn_ext
from flash_attn_ext import attention, attention_varlen, merge, softmax
from flash_attn_ext.integrations import dtensor

WORLD = 2
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo process groups"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = flash_attn_ext.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        self.second = nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, x, x, need_weights=False)[0])


def gradients_of_one_process() -> dict[str, Tensor]:
    model = Model()
    model(normal(4, 6, 16)).sin().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def data_parallel(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(Model())
    model(normal(4, 6, 16)[2 * rank : 2 * rank + 2]).sin().mean().backward()
    for name, expected in gradients_of_one_process().items():
        torch.testing.assert_close(model.module.get_parameter(name).grad, expected, **CLOSE)


def fully_sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model.first)
    fully_shard(model)
    model(normal(4, 6, 16)[2 * rank : 2 * rank + 2]).sin().mean().backward()
    for name, expected in gradients_of_one_process().items():
        torch.testing.assert_close(model.get_parameter(name).grad.full_tensor(), expected, **CLOSE)


TENSORS = {
    "q": normal(2, 5, 4, 8),
    "k": normal(2, 7, 2, 8, seed=1),
    "v": normal(2, 7, 2, 6, seed=2),
    "bias": normal(1, 4, 5, 7, seed=3),
    "sinks": normal(4, seed=4),
}
SLOPES = torch.linspace(0.1, 0.5, 4)
FIXED = {"alibi_slopes": SLOPES.expand(2, 4), "mask": normal(2, 1, 5, 7, seed=5) > -1}


def dense(**tensors: Tensor) -> tuple[Tensor, Tensor]:
    return attention(**tensors, causal=True, return_lse=True)


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return attention_varlen(q, k, v, lengths, return_lse=True)


def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = [attention(q, k[:, half], v[:, half], return_lse=True) for half in (slice(0, 3), slice(3, None))]
    return merge(*parts[0], *parts[1])


def sharded(rank: int) -> None:
    """Batch and heads sharded: results have the same shards and no communication was needed for them."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    dtensor.register()
    mesh = init_device_mesh("cpu", (WORLD,))
    by_batch = dict.fromkeys("qkv", Shard(0)) | {"alibi_slopes": Shard(0), "mask": Shard(0)}
    by_heads = dict.fromkeys("qkv", Shard(2)) | {"bias": Shard(1), "sinks": Shard(0), "alibi_slopes": Shard(1)}
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    rows = {name: TENSORS[name][0][:5] for name in "qkv"}
    plain = {name: TENSORS[name] for name in "qkv"}
    cases: list[tuple[Callable[..., Any], dict[str, Tensor], dict[str, Tensor], dict[str, Any], Any]] = [
        (dense, TENSORS, FIXED, by_batch, Shard(0)),
        (dense, TENSORS, FIXED, by_heads, Shard(2)),
        (dense, plain, {}, dict.fromkeys("qkv", Shard(2)), Shard(2)),
        (dense, plain, {}, {}, Replicate()),
        (dense, plain, {}, {"q": Shard(1)}, None),  # rows: gathered first
        (packed, rows, {"lengths": lengths}, dict.fromkeys("qkv", Shard(1)), Shard(1)),
        (merged, plain, {}, dict.fromkeys("qkv", Shard(2)), Shard(2)),
        (lambda q: (softmax(q), softmax(q).sin()), {"q": plain["q"]}, {}, {"q": Shard(1)}, Shard(1)),
    ]
    for function, leaves, fixed, placements, placed in cases:
        expected_leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        expected = function(**expected_leaves, **fixed)
        incoming = [normal(*x.shape, seed=8) for x in expected]
        expected_gradients = torch.autograd.grad(expected, list(expected_leaves.values()), incoming)

        def distribute(tensors: dict[str, Tensor], places: dict[str, Any] = placements) -> dict[str, DTensor]:
            return {n: distribute_tensor(x, mesh, [places.get(n, Replicate())]) for n, x in tensors.items()}

        own_leaves = {name: x.requires_grad_() for name, x in distribute(leaves).items()}
        own_fixed = distribute(fixed)
        with CommDebugMode() as communication:
            own = function(**own_leaves, **own_fixed)
        if placed is not None:
            assert communication.get_total_counts() == 0, placed
            assert own[0].placements == (placed,)
        own_incoming = [distribute_tensor(x, mesh, y.placements) for x, y in zip(incoming, own, strict=True)]
        own_gradients = torch.autograd.grad(own, list(own_leaves.values()), own_incoming)
        for ours, exact in zip((*own, *own_gradients), (*expected, *expected_gradients), strict=True):
            torch.testing.assert_close(ours.full_tensor(), exact, **CLOSE)
    dropped = distribute_tensor(plain["q"], mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="DTensor"):
        attention(dropped, dropped, dropped, dropout_p=0.5)


def run(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        globals()[name](rank)
        dist.barrier()
        Path(folder, f"done_{rank}").touch()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["data_parallel", "fully_sharded", "sharded"])
def test_two_processes(name: str, tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=run, args=(rank, str(tmp_path), name)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    errors = [path.read_text() for path in tmp_path.glob("error_*")]
    assert not errors, errors[0]
    # Not the exit codes: gloo's threads sometimes abort a process that is over.
    assert len(list(tmp_path.glob("done_*"))) == WORLD
