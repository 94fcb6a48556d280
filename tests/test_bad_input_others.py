"""Wrong arguments of what is not attention itself: modules, packing, flash-attn's functions, explain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_bad_input import NESTED, assert_lists, dense, int32, normal

import flash_attn_ext
from flash_attn_ext import InputError, explain


def mha(**changes: Any) -> Any:
    x = normal(5, 2, 16)
    return flash_attn_ext.MultiheadAttention(16, 4)(**({"query": x, "key": x, "value": x} | changes))


def unpad(**changes: Any) -> Any:
    return flash_attn_ext.unpad_input(**({"hidden_states": normal(2, 3, 4), "attention_mask": int32(1)} | changes))


def pad(**changes: Any) -> Any:
    arguments = {"hidden_states": normal(3, 4), "indices": int32(0, 1, 5), "batch": 2, "seqlen": 3}
    return flash_attn_ext.pad_input(**(arguments | changes))


CONCATENATED = flash_attn_ext.padding.unpad_input_for_concatenated_sequences
MASK_OF = "must be a torch.Tensor or None, got list [1]"
OTHERS: dict[str, tuple[str, Callable[..., Any], dict[str, Any], list[str]]] = {
    "query None": ("MultiheadAttention", mha, {"query": None}, ["query must be a torch.Tensor, got None"]),
    "key list": ("MultiheadAttention", mha, {"key": [1]}, ["key must be a torch.Tensor, got list [1]"]),
    "mask list": ("MultiheadAttention", mha, {"attn_mask": [1]}, [f"attn_mask {MASK_OF}"]),
    "padding list": ("MultiheadAttention", mha, {"key_padding_mask": [1]}, [f"key_padding_mask {MASK_OF}"]),
    "dtype": (
        "MultiheadAttention",
        mha,
        {"query": normal(5, 2, 16).double(), "need_weights": False},
        ["query must have the parameters' dtype torch.float32, got torch.float64"],
    ),
    "device": (
        "MultiheadAttention",
        mha,
        {"value": torch.empty(5, 2, 16, device="meta")},
        ["value must be on the parameters' device cpu, got meta"],
    ),
    "nested input": (
        "MultiheadAttention",
        mha,
        dict.fromkeys(("query", "key", "value"), torch.nested.nested_tensor([normal(3, 16), normal(5, 16)])),
        ["query, key and value must not be nested tensors"],
    ),
    "states list": ("unpad_input", unpad, {"hidden_states": [1]}, ["hidden_states must be a torch.Tensor, got list"]),
    "mask None": ("unpad_input", unpad, {"attention_mask": None}, ["attention_mask must be a torch.Tensor, got None"]),
    "unused list": (
        "unpad_input",
        unpad,
        {"attention_mask": normal(2, 3), "unused_mask": [1]},
        [f"unused_mask {MASK_OF}"],
    ),
    "indices too large": (
        "pad_input",
        pad,
        {"indices": int32(0, 1, 6)},
        ["indices must be in [0, batch * seqlen) = [0, 6), got 0 to 6"],
    ),
    "indices negative": ("pad_input", pad, {"indices": int32(-1, 0, 1)}, ["= [0, 6), got -1 to 1"]),
    "indices float": (
        "pad_input",
        pad,
        {"indices": normal(3), "batch": -1},
        ["indices must be int64 or int32, got torch.float32", "batch and seqlen must be at least 0, got -1 and 3"],
    ),
    "indices list": ("pad_input", pad, {"indices": [0]}, ["indices must be a torch.Tensor, got list [0]"]),
    "indices without rows": (
        "pad_input",
        pad,
        {"batch": 0},
        ["indices must be in [0, batch * seqlen) = [0, 0), got 0 to 5"],
    ),
    "lengths None": (
        CONCATENATED.__name__,
        CONCATENATED,
        {"hidden_states": normal(2, 5, 4), "attention_mask_in_length": None},
        ["attention_mask_in_length must be a torch.Tensor, got None"],
    ),
    "lengths too long": (
        CONCATENATED.__name__,
        CONCATENATED,
        {"hidden_states": normal(2, 5, 4), "attention_mask_in_length": int32(2**30, 2**30, 2, -1, 0).expand(2, -1)},
        ["attention_mask_in_length must be between 0 and seqlen 5, got 1073741824"],
    ),
    "lengths that add up to too much": (
        CONCATENATED.__name__,
        CONCATENATED,
        {"hidden_states": normal(2, 5, 4), "attention_mask_in_length": int32(4, 0, 2, 0, 0).expand(2, -1)},
        ["the lengths of a row must add up to at most seqlen 5, got 6"],
    ),
    "seqlen": ("pad_input", pad, {"seqlen": 3.0}, ["seqlen must be an integer, got float 3.0"]),
    "no q": (
        "flash_attn_func",
        flash_attn_ext.flash_attn_func,
        {"q": [1], "k": normal(1, 2, 3, 4), "v": normal(1, 2, 3, 4), "dropout_p": 0.5, "return_attn_probs": True},
        ["q must be a torch.Tensor, got list [1]"],
    ),
    "probabilities of two": (
        "flash_attn_func",
        flash_attn_ext.flash_attn_func,
        {**dense(), "dropout_p": normal(2), "return_attn_probs": True},
        ["dropout_p must be a number, got Tensor"],
    ),
    "scale": (
        "scaled_dot_product_attention (in the layout (batch, seqlen, heads, dim))",
        flash_attn_ext.scaled_dot_product_attention,
        {**dict.fromkeys(("query", "key", "value"), normal(2, 4, 5, 8)), "scale": "x"},
        ["scale must be a number or None, got str 'x'"],
    ),
    "packed nested": (
        "flash_attn_qkvpacked_func",
        flash_attn_ext.flash_attn_qkvpacked_func,
        {"qkv": NESTED},
        ["qkv must be a tensor of shape (batch, seqlen, 3, heads, head_dim), got a nested tensor"],
    ),
    "flags": (
        "attention",
        flash_attn_ext.attention,
        {**dense(), "causal": "False", "deterministic": None, "return_lse": normal(2), "softcap": -1.0},
        [
            "causal must be True or False, got str 'False'",
            "deterministic must be True or False, got None",
            "return_lse must be True or False, got Tensor",
            "softcap must be",
        ],
    ),
    "flags of torch's": (
        "scaled_dot_product_attention",
        flash_attn_ext.scaled_dot_product_attention,
        {**dict.fromkeys(("query", "key", "value"), normal(2, 4, 5, 8)), "is_causal": "x", "enable_gqa": 2},
        ["is_causal must be True or False, got str 'x'", "enable_gqa must be True or False, got int 2"],
    ),
    "names of torch's": (
        "scaled_dot_product_attention (in the layout (batch, seqlen, heads, dim))",
        flash_attn_ext.scaled_dot_product_attention,
        {"query": normal(2, 4, 5, 8), "key": normal(2, 4, 7, 9), "value": normal(2, 4, 7, 8).double()},
        ["key must have query's batch and head_dim", "value must have query's dtype"],
    ),
    "options of a layer": (
        "FlashAttention",
        flash_attn_ext.FlashAttention,
        {"causal": 2, "window_size": 3, "softcap": "x", "sinks": [0.0], "deterministic": "no"},
        [
            "causal must be True or False, got int 2",
            "window_size must be two integers",
            "softcap must be a number, got str 'x'",
            "sinks must be a torch.Tensor or None, got list [0.0]",
            "deterministic must be True or False, got str 'no'",
        ],
    ),
    "backends in a list": (
        "backends",
        lambda names: flash_attn_ext.backends(names).__enter__(),
        {"names": ["cpu"]},
        ["a name must be a str, got list ['cpu']"],
    ),
    "lengths in a list": (
        "attention_varlen",
        flash_attn_ext.attention_varlen,
        {**{name: normal(5, 4, 8) for name in "qkv"}, "cu_seqlens_q": [0, 5], "window_size": 3},
        ["window_size must be two integers", "cu_seqlens_q must be a torch.Tensor, got list [0, 5]"],
    ),
    "explain 3": (
        "explain",
        explain,
        {"q": 3, "k": normal(1), "v": normal(1), "cu_seqlens_q": [0, 5], "softcap": "x"},
        [
            "q must be a torch.Tensor, got int 3",
            "cu_seqlens_q must be a torch.Tensor or None, got list [0, 5]",
            "cu_seqlens_k must be a torch.Tensor or None, got list [0, 5]",
            "softcap must be a number, got str 'x'",
        ],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name: str) -> None:
    function, call, arguments, expected = OTHERS[name]
    with pytest.raises(InputError) as raised:
        call(**arguments)
    assert_lists(raised.value, function, expected)
