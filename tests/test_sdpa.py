"""scaled_dot_product_attention against torch's own: results, gradients and refusals."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import flash_attn_ext
from flash_attn_ext import InputError, reference, scaled_dot_product_attention

# Sums of under 100 float64 terms of order 1, added up in two orders, differ by less than 1e-13.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

GRADIENT_OF = ("query", "key", "value", "attn_mask")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boolean(*shape: int) -> Tensor:
    return normal(*shape, seed=9) > -0.3


def qkv(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> dict[str, Tensor]:
    return {"query": normal(*query, seed=1), "key": normal(*key, seed=2), "value": normal(*value, seed=3)}


USUAL = qkv((2, 4, 17, 16), (2, 4, 23, 16), (2, 4, 23, 16))
GROUPED = qkv((2, 6, 17, 16), (2, 2, 23, 16), (2, 2, 23, 16))

CASES: dict[str, dict[str, Any]] = {
    "plain": USUAL,
    "another value dim": qkv((2, 4, 17, 16), (2, 4, 23, 16), (2, 4, 23, 5)),
    "three dimensions": qkv((4, 17, 16), (4, 23, 16), (4, 23, 16)),
    "two dimensions": qkv((17, 16), (23, 16), (23, 16)),
    "five dimensions": qkv((3, 2, 4, 7, 16), (3, 2, 4, 9, 16), (3, 2, 4, 9, 16)),
    "batch broadcasts": qkv((2, 4, 17, 16), (1, 4, 23, 16), (4, 23, 16)),
    "heads broadcast": qkv((2, 4, 17, 16), (2, 1, 23, 16), (2, 1, 23, 16)),
    "query broadcasts": qkv((1, 1, 17, 16), (2, 4, 23, 16), (2, 4, 23, 16)),
    "causal": {**USUAL, "is_causal": True},
    "causal, more queries": {**qkv((2, 4, 23, 16), (2, 4, 17, 16), (2, 4, 17, 16)), "is_causal": True},
    "scale": {**USUAL, "scale": 0.3},
    "scale zero": {**USUAL, "scale": 0.0},
    "negative scale": {**USUAL, "scale": -0.2},
    "no keys": qkv((2, 4, 17, 16), (2, 4, 0, 16), (2, 4, 0, 16)),
    "no queries": qkv((2, 4, 0, 16), (2, 4, 23, 16), (2, 4, 23, 16)),
    "bool mask": {**USUAL, "attn_mask": boolean(17, 23)},
    "bool mask with empty rows": {**USUAL, "attn_mask": boolean(17, 23) & (torch.arange(17)[:, None] % 3 > 0)},
    "bool mask of the batch": {**USUAL, "attn_mask": boolean(2, 1, 17, 23)},
    "padding mask": {**USUAL, "attn_mask": boolean(2, 1, 1, 23)},
    "mask of the heads": {**USUAL, "attn_mask": boolean(4, 17, 23)},
    "mask of one dimension": {**USUAL, "attn_mask": boolean(23)},
    "mask of rows": {**USUAL, "attn_mask": boolean(17, 1)},
    "float mask": {**USUAL, "attn_mask": normal(2, 4, 17, 23)},
    "float mask, broadcast": {**USUAL, "attn_mask": normal(1, 4, 1, 23)},
    "float mask with -inf": {**USUAL, "attn_mask": normal(17, 23).masked_fill(~boolean(17, 23), float("-inf"))},
    "float32 mask": {**USUAL, "attn_mask": normal(17, 23).float()},
    "mask in three dimensions": {**qkv((4, 17, 16), (4, 23, 16), (4, 23, 16)), "attn_mask": normal(4, 17, 23)},
    "mask in five": {
        **qkv((3, 2, 4, 7, 16), (3, 2, 4, 9, 16), (3, 2, 4, 9, 16)),
        "attn_mask": normal(3, 1, 4, 7, 9),
    },
    "grouped": {**GROUPED, "enable_gqa": True},
    "grouped, causal": {**GROUPED, "enable_gqa": True, "is_causal": True},
    "grouped, key and value differ": {
        **qkv((2, 6, 17, 16), (2, 3, 23, 16), (2, 2, 23, 16)),
        "enable_gqa": True,
        "attn_mask": boolean(2, 6, 17, 23),
    },
    "grouped in three dimensions": {**qkv((6, 7, 16), (2, 9, 16), (2, 9, 16)), "enable_gqa": True},
}


def on(case: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The case with fresh leaves on the device; masks keep a dtype of their own."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.to(device)
        kept = x.dtype == torch.float32
        return x.detach().to(device, x.dtype if kept else dtype).clone().requires_grad_()

    return {name: leaf(x) for name, x in case.items()}


def results(function: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    out = function(**arguments)
    leaves = {n: arguments[n] for n in GRADIENT_OF if n in arguments and arguments[n].requires_grad}
    incoming = normal(*out.shape, seed=7).to(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), incoming)
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def torchs(**arguments: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch_sdpa(**arguments)


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_in_float64(name: str) -> None:
    ours = results(scaled_dot_product_attention, on(CASES[name], "cpu", torch.float64))
    expected = results(torchs, on(CASES[name], "cpu", torch.float64))
    assert ours.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(ours[part], value, **CLOSE, msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.parametrize("name", ["plain", "causal", "bool mask", "grouped", "five dimensions"])
def test_equals_torch_on_every_device(name: str, device: str, dtype: torch.dtype) -> None:
    exact = results(torchs, on(CASES[name], "cpu", torch.float64))
    ours = results(scaled_dot_product_attention, on(CASES[name], device, dtype))
    low = results(torchs, on(CASES[name], device, torch.float32 if dtype == torch.float64 else dtype))
    for part, value in exact.items():
        # The inputs are rounded to dtype on our side and torch's alike, so that it counts on both.
        bound = reference.error_bound(value, low[part].cpu(), dtype, factor=2.0 if part == "out" else 3.0)
        error = (ours[part].cpu().double() - value).abs().max().item()
        assert ours[part].dtype == dtype
        assert error <= bound, f"{part}: {error} > {bound}"


def test_has_torchs_signature() -> None:
    written = re.search(r"scaled_dot_product_attention\((.*?)\)", torch_sdpa.__doc__ or "", re.DOTALL)
    assert written is not None
    expected = [tuple(part.strip().split("=")) for part in written[1].split(",")]
    own = inspect.signature(scaled_dot_product_attention).parameters.values()
    assert [(p.name,) if p.default is p.empty else (p.name, str(p.default)) for p in own] == expected
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in own)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one dimension": (qkv((16,), (23, 16), (23, 16)), "query must have at least 2 dimensions"),
    "mask and causal": ({**USUAL, "attn_mask": boolean(17, 23), "is_causal": True}, "is_causal must be False"),
    "integer mask": ({**USUAL, "attn_mask": boolean(17, 23).int()}, "attn_mask must be bool, float32 or"),
    "float16 mask": ({**USUAL, "attn_mask": normal(17, 23).half()}, "attn_mask must be float64, got float16"),
    "mask of five dimensions": ({**USUAL, "attn_mask": boolean(1, 1, 1, 17, 23)}, "attn_mask must have at most 4 dim"),
    "mask that does not broadcast": ({**USUAL, "attn_mask": boolean(16, 23)}, "attn_mask must broadcast to (batch,"),
    "heads without enable_gqa": (GROUPED, "must broadcast"),
    "heads that do not divide": (
        {**qkv((2, 5, 17, 16), (2, 2, 23, 16), (2, 2, 23, 16)), "enable_gqa": True},
        "the heads of key must divide the 5 of query, got 2",
    ),
    "batches": (qkv((2, 4, 17, 16), (3, 4, 23, 16), (3, 4, 23, 16)), "must broadcast"),
    "key dim": (qkv((2, 4, 17, 16), (2, 4, 23, 15), (2, 4, 23, 16)), "key must have query's batch and head_dim"),
    "value rows": (qkv((2, 4, 17, 16), (2, 4, 23, 16), (2, 4, 22, 16)), "value must have"),
    "dropout": ({**USUAL, "dropout_p": 1.5}, "dropout_p must be in [0, 1], got 1.5"),
    "integers": ({n: x.int() for n, x in USUAL.items()}, "got int32"),
    "dtypes": ({**USUAL, "key": USUAL["key"].float()}, "float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_raises_where_torch_raises(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises((RuntimeError, IndexError)):
        torchs(**arguments)
    with pytest.raises(InputError, match=re.escape(message)):
        scaled_dot_product_attention(**arguments)


def test_arguments_that_are_no_tensors() -> None:
    with pytest.raises(InputError, match=r"query must be a torch\.Tensor, got list"):
        scaled_dot_product_attention([1.0], USUAL["key"], USUAL["value"])  # type: ignore[arg-type]


def test_lists_every_unmet_constraint() -> None:
    with pytest.raises(InputError) as raised:
        scaled_dot_product_attention(**GROUPED, attn_mask=torch.ones(5, dtype=torch.int32), is_causal=True)
    assert len(raised.value.constraints) == 3  # is_causal beside a mask, the mask's dtype, heads


def test_dropout_follows_manual_seed_and_keeps_the_mean() -> None:
    case = {n: x.float() for n, x in USUAL.items()} | {"value": torch.ones(2, 4, 23, 16), "dropout_p": 0.25}
    torch.manual_seed(3)
    first = scaled_dot_product_attention(**case)
    torch.manual_seed(3)
    assert torch.equal(scaled_dot_product_attention(**case), first)
    assert not torch.equal(scaled_dot_product_attention(**case), first)
    # 2 * 4 * 17 rows of mean 1; one row's standard deviation is at most sqrt(0.25 / 0.75) = 0.58: 6 sigma.
    assert abs(first[..., 0].mean().item() - 1) < 6 * 0.58 / (2 * 4 * 17) ** 0.5
    everything = scaled_dot_product_attention(**{**case, "dropout_p": 1.0})
    assert torch.equal(everything, torch.zeros_like(everything))


def test_output_of_a_transposed_projection_needs_no_copy() -> None:
    """(batch, heads, seqlen, dim) usually is a transposed view of (batch, seqlen, heads, dim): so is the result."""
    out = scaled_dot_product_attention(USUAL["query"], USUAL["key"], USUAL["value"])
    assert out.transpose(1, 2).is_contiguous()
    assert flash_attn_ext.scaled_dot_product_attention is scaled_dot_product_attention
