"""flash-attn's forward and backward pass by themselves are those of its differentiable functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_ext import InputError, attention, flash_attn_func, flash_attn_varlen_func, merge
from flash_attn_ext.flash_attn_passes import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size_left": 3, "window_size_right": -1, "softcap": 2.0, "softmax_scale": 0.3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.02])},
}
CU = torch.tensor([0, 5, 6, 14], dtype=torch.int32)


def arguments(name: str) -> dict[str, Any]:
    defaults = {"dropout_p": 0.0, "softmax_scale": 0.25, "causal": False, "window_size_left": -1}
    return {**defaults, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, **OPTIONS[name]}


def of_functions(options: dict[str, Any]) -> dict[str, Any]:
    sides = ("window_size_left", "window_size_right")
    rest = {key: x for key, x in options.items() if key not in sides}
    return {**rest, "window_size": tuple(options[side] for side in sides)}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_passes_are_those_of_the_functions(packed: bool, name: str) -> None:
    options = arguments(name)
    rows = (14,) if packed else (2, 7)
    q, k, v = (draw(*rows, heads, 16, seed=i).requires_grad_() for i, heads in enumerate((4, 2, 2)))
    lengths = (CU, CU, 8, 8) if packed else ()
    function = flash_attn_varlen_func if packed else flash_attn_func
    expected, expected_lse, _ = function(q, k, v, *lengths, **of_functions(options), return_attn_probs=True)
    dout = draw(*expected.shape, seed=7)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), dout)

    forward = _flash_attn_varlen_forward if packed else _flash_attn_forward
    out, lse, dropped, rng_state = forward(q, k, v, *lengths, **options, return_softmax=True)
    assert not out.requires_grad
    assert dropped.numel() == 0
    assert rng_state.shape == (2,)
    gradients = [torch.full_like(x, 3.0) for x in (q, k, v)]
    backward = _flash_attn_varlen_backward if packed else _flash_attn_backward
    with torch.no_grad():
        sums = backward(dout, q, k, v, out, lse, *gradients, *lengths, **options, deterministic=True)
    torch.testing.assert_close([out, lse, *gradients], [expected, expected_lse, *expected_gradients])
    torch.testing.assert_close(sums, (dout * expected.detach()).sum(-1).transpose(-1, -2))
    assert sums.shape == lse.shape


def test_backward_repeats_the_dropout_of_forward() -> None:
    q, k, v = (draw(1, 6, 2, 8, seed=i) for i in range(3))
    options = {**arguments("causal"), "dropout_p": 0.4}
    out, lse, dropped, rng_state = _flash_attn_forward(q, k, v, **options, return_softmax=True)
    kept = torch.where(dropped > 0, dropped, 0) / 0.6  # negative: dropped
    torch.testing.assert_close(out, (kept @ v.transpose(1, 2)).transpose(1, 2))
    dout, dv = draw(*out.shape, seed=4), torch.empty_like(v)
    _flash_attn_backward(
        *(dout, q, k, v, out, lse, None, None, dv), **options, deterministic=False, rng_state=rng_state
    )
    torch.testing.assert_close(dv, (kept.mT @ dout.transpose(1, 2)).transpose(1, 2))


def test_dropped_probabilities_are_those_of_the_keys_in_use() -> None:
    q, k, v = (draw(rows, 2, 8, seed=i) for i, rows in enumerate((5, 7, 7)))
    starts_q, starts_k, used = (torch.tensor(x, dtype=torch.int32) for x in ((0, 2, 5), (0, 3, 7), (1, 2)))
    options = {**arguments("causal"), "dropout_p": 0.3, "return_softmax": True, "seqused_k": used}
    out, _, dropped, _ = _flash_attn_varlen_forward(q, k, v, starts_q, starts_k, 3, 4, **options)
    for b, (rows, keys) in enumerate(((slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 7)))):
        assert dropped[b, :, :, used[b] :].count_nonzero() == 0
        kept = dropped[b, :, : rows.stop - rows.start, : keys.stop - keys.start].clamp(min=0) / 0.7
        torch.testing.assert_close(out[rows], torch.einsum("hqk,khd->qhd", kept, v[keys]))


def test_parts_of_the_keys_as_ring_attention_takes_them() -> None:
    q, k, v = (draw(2, 8, 2, 16, seed=i).requires_grad_() for i in range(3))
    expected = attention(q, k, v, softmax_scale=0.25)
    dout = draw(*expected.shape, seed=5)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), dout)
    options = arguments("plain")
    with torch.no_grad():
        blocks = [(x, y) for x, y in zip(k.chunk(2, 1), v.chunk(2, 1), strict=True)]
        results = [_flash_attn_forward(q, *block, **options, return_softmax=False)[:2] for block in blocks]
        out, lse = merge(*results[0], *results[1])
        dq, parts = torch.zeros_like(q), []
        for block in blocks:
            part = [torch.empty_like(x) for x in (q, *block)]
            _flash_attn_backward(dout, q, *block, out, lse, *part, **options, deterministic=True)
            dq += part[0]
            parts.append(part[1:])
    dk, dv = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    torch.testing.assert_close([out, dq, dk, dv], [expected, *expected_gradients])


def test_gradients_are_written_into_their_own_shapes_only() -> None:
    q, k, v = (draw(1, 6, 2, 8, seed=i) for i in range(3))
    out, lse, *_ = _flash_attn_forward(q, k, v, **arguments("plain"), return_softmax=False)
    into = [torch.zeros(3, 6, 2, 8, dtype=q.dtype), torch.zeros_like(k, dtype=torch.float32), v.to("meta")]
    with pytest.raises(InputError) as raised:
        _flash_attn_backward(out[:, :5], q, k, v, out, lse, *into, **arguments("plain"), deterministic=True)
    facts = "torch.float64 of shape (1, 6, 2, 8) on cpu"
    assert raised.value.constraints[:3] == (
        f"dq must be, as q, {facts}, got torch.float64 of shape (3, 6, 2, 8) on cpu",
        f"dk must be, as k, {facts}, got torch.float32 of shape (1, 6, 2, 8) on cpu",
        f"dv must be, as v, {facts}, got torch.float64 of shape (1, 6, 2, 8) on meta",
    )
    assert raised.value.constraints[3].startswith("dout must be")
    assert into[0].count_nonzero() == 0
    into = [None, [1], torch.empty_like(v[:, :5])]
    with pytest.raises(
        InputError, match=r"1 constraint is not met\n- dk must be a torch.Tensor or None, got list \[1\]"
    ):
        _flash_attn_backward(out, q, k, v, out, lse, *into, **arguments("plain"), deterministic=True)


def test_what_cannot_be_taken_raises() -> None:
    q = draw(1, 6, 2, 8, seed=0)
    with pytest.raises(InputError, match="_flash_attn_forward: 1 constraint"):
        _flash_attn_forward(q, q[..., :4], q, **arguments("plain"), return_softmax=False)
    options = {**arguments("plain"), "dropout_p": 1.5}
    with pytest.raises(InputError, match="_flash_attn_backward: 2 constraints"):
        _flash_attn_backward(*(q,) * 5, q[..., 0].mT, None, None, None, **options, deterministic=True, rng_state=None)
    packed = q[0]
    options = {**arguments("plain"), "block_table": torch.zeros(1), "leftpad_k": torch.zeros(1)}
    with pytest.raises(InputError, match="2 constraints are not met"):
        _flash_attn_varlen_forward(packed, packed, packed, CU, CU, 8, 8, **options)
    options = {**arguments("plain"), "dropout_p": "x"}
    with pytest.raises(
        InputError, match=r"(?s)_flash_attn_forward: 2 constraints.*q must be a torch.Tensor.*dropout_p"
    ):
        _flash_attn_forward([1], q, q, **options, return_softmax=False)
    with pytest.raises(InputError, match="q must be"):
        _flash_attn_backward(q, [1], q, q, q, q[..., 0].mT, None, None, None, **arguments("plain"), deterministic=True)
