"""MultiheadAttention against torch's in every option, and FlashAttention against the functions it wraps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flash_attn_ext
from flash_attn_ext import FlashAttention, InputError, MultiheadAttention, reference

# Sums of under 100 float64 terms of order 1, added up in two orders, differ by less than 1e-13; the projections sum up
# results of the attention once more.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}

BATCH, SEQLEN_Q, SEQLEN_K, EMBED, HEADS = 2, 7, 9, 24, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same random parameters, biases included (torch starts them at zero)."""
    options = {"dtype": torch.float64, "batch_first": True, **options}
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + seed) / math.sqrt(parameter.shape[-1]))
    ours = MultiheadAttention(EMBED, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    """query, key and value in the layout of the module."""
    tensors = []
    for seed, (length, width) in enumerate(((SEQLEN_Q, EMBED), (SEQLEN_K, module.kdim), (SEQLEN_K, module.vdim))):
        shape = ((BATCH, length) if module.batch_first else (length, BATCH)) if batched else (length,)
        tensors.append(normal(*shape, width, seed=seed).requires_grad_())
    return tensors


def results(module: nn.MultiheadAttention, arguments: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, weights, and gradients of inputs, parameters and float masks."""
    out, weights = module(*arguments, **options)
    by_identity = {x: name for name, x in reversed(list(zip(("query", "key", "value"), arguments, strict=True)))}
    leaves = {name: x for x, name in by_identity.items()} | dict(module.named_parameters())
    leaves |= {n: x for n, x in options.items() if isinstance(x, Tensor) and x.requires_grad}
    outputs = [out] if weights is None else [out, weights]
    incoming = [normal(*x.shape, seed=50 + i) for i, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    named = dict(zip(("out", "weights"), outputs, strict=False))
    return named | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def compare(theirs: nn.MultiheadAttention, ours: MultiheadAttention, arguments: list[Tensor], **options: Any) -> None:
    expected, own = results(theirs, arguments, **options), results(ours, arguments, **options)
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def ignored(*shape: int) -> Tensor:
    """A bool mask in torch's sense for this module, True = ignore; no row ignores everything."""
    mask = normal(*shape, seed=8) > 0.3
    mask[..., 0] = False
    return mask


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": ignored(BATCH, SEQLEN_K)},
    "float padding": {"key_padding_mask": normal(BATCH, SEQLEN_K)},
    "mask": {"attn_mask": ignored(SEQLEN_Q, SEQLEN_K)},
    "float mask": {"attn_mask": normal(SEQLEN_Q, SEQLEN_K)},
    "mask per head": {"attn_mask": ignored(BATCH * HEADS, SEQLEN_Q, SEQLEN_K)},
    "float mask per head": {"attn_mask": normal(BATCH * HEADS, SEQLEN_Q, SEQLEN_K)},
    "both": {
        "key_padding_mask": ignored(BATCH, SEQLEN_K),
        "attn_mask": ignored(BATCH * HEADS, SEQLEN_Q, SEQLEN_K),
    },
    "both float": {
        "key_padding_mask": normal(BATCH, SEQLEN_K),
        "attn_mask": normal(SEQLEN_Q, SEQLEN_K).masked_fill(ignored(SEQLEN_Q, SEQLEN_K), -math.inf),
    },
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "kdim and vdim": {"kdim": 10, "vdim": 14},
    "vdim, no bias": {"vdim": 14, "bias": False},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 14, "batch_first": False},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("parameters", "masks"), list(itertools.product(PARAMETERS, MASKS)))
def test_equals_torch(parameters: str, masks: str, need_weights: bool) -> None:
    theirs, ours = pair(**PARAMETERS[parameters])
    compare(theirs, ours, inputs(theirs), need_weights=need_weights, **MASKS[masks])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_unbatched(parameters: str, need_weights: bool) -> None:
    theirs, ours = pair(**PARAMETERS[parameters])
    compare(
        theirs,
        ours,
        inputs(theirs, batched=False),
        need_weights=need_weights,
        key_padding_mask=ignored(SEQLEN_K),
        attn_mask=ignored(HEADS, SEQLEN_Q, SEQLEN_K),
    )


@pytest.mark.parametrize("batched", [False, True])
def test_weights_of_every_head(batched: bool) -> None:
    theirs, ours = pair()
    compare(theirs, ours, inputs(theirs, batched), average_attn_weights=False)


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention(batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    x = inputs(theirs)[0]
    compare(theirs, ours, [x, x, x], need_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("parameters", ["plain", "sequence first"])
def test_is_causal(parameters: str, padding: bool, need_weights: bool) -> None:
    """A hint about attn_mask, whose diagonal starts in the top left corner."""
    theirs, ours = pair(**PARAMETERS[parameters])
    options: dict[str, Any] = {"attn_mask": torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool).triu(1)}
    if padding:
        options["key_padding_mask"] = ignored(BATCH, SEQLEN_K)
    compare(theirs, ours, inputs(theirs), is_causal=True, need_weights=need_weights, **options)


@pytest.mark.parametrize("parameters", ["bias_kv", "zero_attn"])
def test_is_causal_beside_added_keys_changes_nothing(parameters: str) -> None:
    _, ours = pair(**PARAMETERS[parameters])
    mask = torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool).triu(1)
    arguments = inputs(ours)
    hinted, _ = ours(*arguments, attn_mask=mask, is_causal=True, need_weights=False)
    plain, _ = ours(*arguments, attn_mask=mask, need_weights=False)
    assert torch.equal(hinted, plain)


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_that_ignore_every_key_are_zero(need_weights: bool) -> None:
    """Before the output projection; torch gives NaN for its default, need_weights=True."""
    _, ours = pair()
    mask = ignored(SEQLEN_Q, SEQLEN_K)
    mask[3] = True
    found = results(ours, inputs(ours), attn_mask=mask, need_weights=need_weights)
    expected = ours.out_proj.bias.expand(BATCH, EMBED)
    torch.testing.assert_close(found["out"][:, 3], expected, **CLOSE)
    assert all(x.isfinite().all() for x in found.values())
    if need_weights:
        assert found["weights"][:, 3].count_nonzero() == 0


def test_float_masks_have_gradients() -> None:
    theirs, ours = pair()
    mask = normal(BATCH * HEADS, SEQLEN_Q, SEQLEN_K).requires_grad_()
    compare(theirs, ours, inputs(theirs), attn_mask=mask, need_weights=False)
    own = results(ours, inputs(ours), attn_mask=mask, need_weights=False)
    assert own["dattn_mask"].count_nonzero() == mask.numel()


def test_dropout_with_weights_equals_torch() -> None:
    """The same elements of the same matrix are dropped, and the weights returned are those after dropout."""
    theirs, ours = pair(dropout=0.4)
    arguments = inputs(theirs)
    torch.manual_seed(5)
    expected = theirs(*arguments, average_attn_weights=False)
    torch.manual_seed(5)
    torch.testing.assert_close(ours(*arguments, average_attn_weights=False), expected, **CLOSE)
    assert expected[1].count_nonzero() < expected[1].numel()


def test_dropout_without_weights() -> None:
    theirs, ours = pair(dropout=0.4)
    arguments = inputs(theirs)
    torch.manual_seed(5)
    first, _ = ours(*arguments, need_weights=False)
    torch.manual_seed(5)
    assert torch.equal(ours(*arguments, need_weights=False)[0], first)
    assert not torch.equal(ours(*arguments, need_weights=False)[0], first)
    ours.eval()
    theirs.eval()
    compare(theirs, ours, arguments, need_weights=False)
    everything = MultiheadAttention(EMBED, HEADS, dropout=1.0, batch_first=True, dtype=torch.float64)
    out, _ = everything(*arguments, need_weights=False)
    torch.testing.assert_close(out, everything.out_proj.bias.expand_as(out), **CLOSE)


def test_state_dicts_go_both_ways() -> None:
    for options in PARAMETERS.values():
        theirs, ours = pair(**options)
        assert {n: x.shape for n, x in ours.state_dict().items()} == {
            n: x.shape for n, x in theirs.state_dict().items()
        }
        theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)


def test_starts_as_torchs_does() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True)
    torch.manual_seed(0)
    ours = MultiheadAttention(EMBED, HEADS, add_bias_kv=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_swaps_into_an_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = normal(BATCH, SEQLEN_Q, EMBED)
    mask, padding = torch.ones(SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).triu(1), ignored(BATCH, SEQLEN_Q)
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"src_mask": mask, "is_causal": True},
        {"src_mask": mask, "src_key_padding_mask": padding},
    )
    expected = [layer(x, **options) for options in calls]
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    for options, right in zip(calls, expected, strict=True):
        torch.testing.assert_close(layer(x, **options), right, **CLOSE)


def test_on_every_device(device: str, dtype: torch.dtype) -> None:
    theirs, ours = pair()
    mask = ignored(SEQLEN_Q, SEQLEN_K)
    exact, _ = theirs(*inputs(theirs), attn_mask=mask, need_weights=False)
    low = torch.float32 if dtype == torch.float64 else dtype
    torchs, _ = theirs.to(device, low)(*(x.to(device, low) for x in inputs(theirs)), attn_mask=mask.to(device))
    out, _ = ours.to(device, dtype)(
        *(x.to(device, dtype) for x in inputs(ours)), attn_mask=mask.to(device), need_weights=False
    )
    assert out.dtype == dtype
    assert (out.cpu() - exact).abs().max().item() <= reference.error_bound(exact, torchs.cpu(), dtype)


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(need_weights: bool) -> None:
    theirs, ours = pair(dtype=torch.float32, add_bias_kv=True, add_zero_attn=True)
    arguments = [x.detach().float() for x in inputs(theirs)]
    mask = normal(SEQLEN_Q, SEQLEN_K).float()
    exact, _ = theirs(*arguments, attn_mask=mask, need_weights=need_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torchs, _ = theirs(*arguments, attn_mask=mask, need_weights=need_weights)
        out, _ = ours(*arguments, attn_mask=mask, need_weights=need_weights)
    assert out.dtype == torchs.dtype == torch.bfloat16
    assert (out - exact).abs().max().item() <= reference.error_bound(exact, torchs, torch.bfloat16)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ranks": ({"query": normal(SEQLEN_Q, EMBED)}, [r"must all have 2 dimensions \(unbatched\) or 3 \(batched\)"]),
    "features": ({"key": normal(BATCH, SEQLEN_K, 5)}, ["key must have 24 features"]),
    "batch and lengths": (
        {"value": normal(3, 4, EMBED), "is_causal": True},
        ["value must have 24 features and query's batch 2", "attn_mask must be given"],
    ),
    "lengths": ({"value": normal(BATCH, 4, EMBED)}, ["value must have key's seqlen_k 9, got 4"]),
    "masks": (
        {"key_padding_mask": ignored(BATCH, 4), "attn_mask": ignored(5, 5)},
        [r"key_padding_mask must have shape .*\(2, 9\)", r"attn_mask must have shape .*\(7, 9\) or .*\(8, 7, 9\)"],
    ),
    "mask dtypes": (
        {"key_padding_mask": torch.zeros(BATCH, SEQLEN_K).int(), "attn_mask": torch.zeros(SEQLEN_Q, SEQLEN_K).long()},
        ["key_padding_mask must be bool or floating point, got torch.int32", "attn_mask must be bool or floating"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_multihead_attention_refuses(name: str) -> None:
    _, ours = pair()
    changes, messages = REFUSED[name]
    arguments = dict(zip(("query", "key", "value"), inputs(ours), strict=True))
    with pytest.raises(InputError) as raised:
        ours(**{**arguments, **changes})
    assert len(raised.value.constraints) == len(messages)
    for message in messages:
        raised.match(message)


def test_flash_attention_is_attention_with_its_options() -> None:
    q, k, v = normal(2, 11, 4, 8, seed=1), normal(2, 13, 2, 8, seed=2), normal(2, 13, 2, 8, seed=3)
    options: dict[str, Any] = {
        "causal": True,
        "window_size": (6, 0),
        "softmax_scale": 0.4,
        "softcap": 4.0,
        "alibi_slopes": torch.linspace(0.1, 0.4, 4),
        "sinks": normal(4),
    }
    later: dict[str, Any] = {"bias": normal(4, 11, 13), "mask": normal(11, 13) > -1}
    module = FlashAttention(**options)
    found = module(q, k, v, **later, return_lse=True)
    torch.testing.assert_close(found, flash_attn_ext.attention(q, k, v, **options, **later, return_lse=True))
    lengths = {name: torch.tensor([5, 9], dtype=torch.int32) for name in ("seqused_q", "seqused_k")}
    found = module(q, k, v, **lengths)
    torch.testing.assert_close(found, flash_attn_ext.attention(q, k, v, **options, **lengths))

    cu_seqlens = torch.tensor([0, 4, 11], dtype=torch.int32), torch.tensor([0, 6, 13], dtype=torch.int32)
    packed = module(q[0], k[0], v[0], *cu_seqlens, max_seqlen_q=7, max_seqlen_k=7)
    torch.testing.assert_close(packed, flash_attn_ext.attention_varlen(q[0], k[0], v[0], *cu_seqlens, **options))


def test_flash_attention_refuses_lengths_that_it_would_not_use() -> None:
    q, starts = normal(2, 5, 4, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    wrong: list[tuple[Tensor, dict[str, Any], list[str]]] = [
        (q, {"max_seqlen_q": 1, "max_seqlen_k": 5}, ["max_seqlen_q must be None", "max_seqlen_k must be None"]),
        (q, {"cu_seqlens_k": starts}, [f"{name} must have 3 dimensions" for name in "qkv"]),
        (q[0], {"cu_seqlens_k": starts}, ["cu_seqlens_q must be given"]),
    ]
    for x, lengths, expected in wrong:
        with pytest.raises(InputError, match="FlashAttention: ") as raised:
            FlashAttention(softcap=-1.0)(x, x, x, **lengths)
        assert len(raised.value.constraints) == len(expected) + 1
        for line in (*expected, "softcap must be finite"):
            assert line in str(raised.value)


def test_flash_attention_trains_its_sinks_and_saves_nothing_else() -> None:
    module = FlashAttention(sinks=torch.zeros(4), alibi_slopes=torch.ones(4))
    assert list(module.state_dict()) == ["sinks"]
    module(*(normal(2, 5, 4, 8, seed=seed) for seed in range(3))).sum().backward()
    assert module.sinks.grad.count_nonzero() == 4
    assert list(FlashAttention().state_dict()) == []
    assert repr(FlashAttention(causal=True, window_size=(4, 0))) == (
        "FlashAttention(causal=True, window_size=(4, 0), dropout_p=0.0)"
    )
    assert repr(FlashAttention(softmax_scale=0.5, softcap=30.0, dropout_p=0.1, sinks=torch.zeros(4))) == (
        "FlashAttention(causal=False, softmax_scale=0.5, softcap=30.0, dropout_p=0.1, sinks=(4,))"
    )


def test_flash_attention_drops_in_training_only() -> None:
    q = normal(2, 5, 4, 8)
    module = FlashAttention(dropout_p=0.5)
    torch.manual_seed(1)
    dropped = module(q, q, q)
    torch.manual_seed(1)
    assert torch.equal(dropped, flash_attn_ext.attention(q, q, q, dropout_p=0.5))
    module.eval()
    assert torch.equal(module(q, q, q), flash_attn_ext.attention(q, q, q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_flash_attention_keeps_its_slopes_in_float32(dtype: torch.dtype) -> None:
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    q = normal(2, 5, 4, 8).to(dtype)
    model = nn.Sequential(FlashAttention(alibi_slopes=slopes))
    for converted in (model.to(dtype), model.half().to("cpu", dtype), model.float().to(q)):
        assert torch.equal(converted[0].alibi_slopes, slopes)
        assert torch.equal(converted[0](q, q, q), flash_attn_ext.attention(q, q, q, alibi_slopes=slopes))
    assert model.state_dict() == {}
    meta = model.to("meta").to(dtype)[0].alibi_slopes
    assert (meta.device.type, meta.dtype) == ("meta", torch.float32)
    assert model.to_empty(device="cpu")[0].alibi_slopes.device.type == "cpu"
