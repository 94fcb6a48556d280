"""The mask function says what that of the library does, and attention treats masks of all kinds by their elements."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="4.57", reason="transformers is not installed")

from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flash_attn_ext import InputError, reference
from flash_attn_ext.integrations import transformers as fa_ext
from flash_attn_ext.integrations.masks import AttentionMask, Band

BATCH, HEADS, HEADS_KV, HEAD_DIM = 3, 4, 2, 8
VERSION_5 = "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters

LEFT = torch.ones(BATCH, 20, dtype=torch.bool)
LEFT[1, :4] = LEFT[2, :9] = False
RIGHT, HOLES, NONE = LEFT.flip(1), LEFT.clone(), torch.ones(BATCH, 20, dtype=torch.bool)
HOLES[0, 3:6] = False


def mask_call(
    function: Callable[..., Tensor],
    q_length: int = 20,
    kv_length: int = 20,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The arguments with which the installed version calls mask functions."""
    call = {
        "batch_size": BATCH,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": attention_mask,
        **options,
    }
    if VERSION_5:
        return {**call, "q_length": q_length, "q_offset": q_offset}
    return {**call, "cache_position": torch.arange(q_length) + q_offset}


def expected_mask(call: dict[str, Any]) -> Tensor:
    mask = masking_utils.sdpa_mask(**{**call, "allow_is_causal_skip": False})
    return mask.expand(BATCH, -1, -1, -1)


def packed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    sequences = torch.tensor([[0] * 5 + [1] * 12 + [2] * 3]).expand(BATCH, -1)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(sequences))


causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function
chunked = masking_utils.chunked_causal_mask_function(6, torch.zeros(BATCH, dtype=torch.int64))
CALLS: dict[str, dict[str, Any]] = {
    "causal": mask_call(causal),
    "causal, one row": mask_call(causal, q_length=1, q_offset=19),
    "window": mask_call(window(5)),
    "window of one": mask_call(window(1)),
    "left padding": mask_call(causal, attention_mask=LEFT),
    "right padding": mask_call(window(5), attention_mask=RIGHT),
    "holes": mask_call(causal, attention_mask=HOLES),
    "all tokens": mask_call(causal, attention_mask=NONE),
    "continued": mask_call(causal, q_length=3, q_offset=17, attention_mask=LEFT),
    "static cache": mask_call(causal, q_length=6, q_offset=4, attention_mask=LEFT[:, :10]),
    "static cache, empty": mask_call(causal, q_length=6),
    "sliding cache": mask_call(window(5), q_length=3, kv_length=7, q_offset=17, kv_offset=13, attention_mask=LEFT),
    "packed": mask_call(packed(causal)),
    "packed, window": mask_call(packed(window(3))),
    "chunks": mask_call(chunked),
    "packed chunks": mask_call(packed(chunked)),
    "chunks, right padding": mask_call(chunked, attention_mask=RIGHT),
}
# What is no band, and comes written out.
OTHER_CALLS: dict[str, dict[str, Any]] = {
    "chunks, continued": mask_call(chunked, q_length=3, q_offset=17),
    "chunks from the padding on": mask_call(
        masking_utils.chunked_causal_mask_function(6, torch.tensor([0, 4, 9])), attention_mask=LEFT
    ),
    "union": mask_call(masking_utils.or_masks(causal, lambda batch, head, row, key: key < 3)),
    "unknown": mask_call(lambda batch, head, row, key: (row + key) % 3 != 0),
}


def bidirectional_calls() -> dict[str, dict[str, Any]]:
    full = masking_utils.bidirectional_mask_function
    near = masking_utils.sliding_window_bidirectional_mask_function
    calls = {
        "bidirectional": mask_call(full, attention_mask=NONE, allow_is_causal_skip=False),
        "bidirectional, right padding": mask_call(full, attention_mask=RIGHT, allow_is_causal_skip=False),
        "bidirectional, left padding": mask_call(full, attention_mask=LEFT, allow_is_causal_skip=False),
        "bidirectional, window": mask_call(near(3), attention_mask=RIGHT, allow_is_causal_skip=False),
        "cross": mask_call(full, q_length=7, attention_mask=RIGHT, allow_is_causal_skip=False),
    }
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        positions = torch.tensor([[*range(5), *range(12), *range(3)]]).expand(BATCH, -1)
        restarting = masking_utils.remap_positions_for_packed_sequence(window(3), positions)
        calls["packed, positions"] = mask_call(packed(restarting))
    return calls


if VERSION_5:
    CALLS |= bidirectional_calls()


class Module(nn.Module):
    num_key_value_groups = HEADS // HEADS_KV

    def __init__(self, is_causal: bool | None = True) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal


def attend(
    mask: Tensor | None,
    seqlen_q: int = 20,
    seqlen_k: int = 20,
    *,
    module: nn.Module | None = None,
    function: Callable[..., tuple[Tensor, None]] = fa_ext.attention_function,
    **options: Any,
) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, seqlen: int) -> Tensor:
        x = torch.randn(BATCH, heads, seqlen, HEAD_DIM, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    q, k, v = draw(HEADS, seqlen_q), draw(HEADS_KV, seqlen_k), draw(HEADS_KV, seqlen_k)
    out, weights = function(Module() if module is None else module, q, k, v, mask, **options)
    assert weights is None
    return [
        out.detach(),
        *torch.autograd.grad(out, (q, k, v), torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)),
    ]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_band_is_the_librarys_mask(name: str) -> None:
    call = CALLS[name]
    expected, mask = expected_mask(call), fa_ext.mask_function(**call)
    if name == "causal, one row":
        assert mask is None
        return
    assert isinstance(mask, AttentionMask)
    assert mask.band is not None
    assert mask.shape == expected.shape
    by_band = attend(mask, *mask.shape[2:])
    assert mask.band is not None, "attention wrote the mask out"
    assert_same(by_band, attend(expected, *mask.shape[2:]))
    assert torch.equal(mask & True, expected)


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_masks_are_written_out(name: str) -> None:
    call = OTHER_CALLS[name]
    mask, expected = fa_ext.mask_function(**call), expected_mask(call)
    assert isinstance(mask, AttentionMask)
    assert mask.band is None
    assert torch.equal(mask & True, expected)
    assert_same(attend(mask, *mask.shape[2:]), attend(expected, *mask.shape[2:]))


def test_patterns_that_changed_are_not_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A future version with another meaning, and one with other names in its closures."""
    from flash_attn_ext.integrations import mask_patterns

    def exclusive(sliding_window: int) -> Callable[..., Tensor]:
        return lambda batch, head, row, key: key > row - sliding_window - 1

    def renamed(window_size: int) -> Callable[..., Tensor]:
        return lambda batch, head, row, key: key > row - window_size

    for factory in (exclusive, renamed):
        monkeypatch.setattr(mask_patterns, "_FACTORIES", {})
        monkeypatch.setattr(masking_utils, "sliding_window_overlay", factory)
        mask_patterns._learn()
        call = mask_call(masking_utils.and_masks(factory(5), causal))
        mask = fa_ext.mask_function(**call)
        assert mask.band is None
        assert torch.equal(mask & True, expected_mask(call))
        assert fa_ext.mask_function(**mask_call(packed(causal))).band is not None


def test_mask_in_other_code() -> None:
    """Slices and sums are those of the mask; what is written into it is seen; it cannot turn into numbers."""
    call = CALLS["left padding"]
    expected = expected_mask(call)
    mask = fa_ext.mask_function(**call)
    assert torch.equal(mask[:, :, 3:, :7], expected[:, :, 3:, :7])
    assert torch.equal(mask.logical_not(), ~expected)
    assert mask.detach().shape == mask.shape
    scores = torch.randn(BATCH, HEADS, 20, 20)
    lowest = torch.finfo(scores.dtype).min
    assert torch.equal((scores + mask).softmax(-1), scores.masked_fill(~expected, lowest).softmax(-1))
    with pytest.raises(TypeError, match="True = attend"):
        mask.float()

    mask = AttentionMask(Band(1, 20, 20, torch.device("cpu"), right=0))
    copied, again = copy.deepcopy([mask, mask])
    assert copied is again
    assert copied.band == mask.band
    mask[:, :, 5, :3] = False
    assert torch.equal(copy.deepcopy(mask).dense, mask.dense)
    assert copied.dense[0, 0, 5, 0]
    changed = torch.ones(20, 20, dtype=torch.bool).tril()
    changed[5, :3] = False
    assert_same(attend(mask), attend(changed.expand(BATCH, 1, -1, -1)))


@pytest.mark.parametrize("sizes", [(20, 20), (1, 20), (5, 20)])
@pytest.mark.parametrize("of_module", [True, False, None])
@pytest.mark.parametrize("is_causal", [True, False, None])
def test_without_a_mask_causal_order_is_that_of_the_librarys_sdpa(
    is_causal: bool | None, of_module: bool | None, sizes: tuple[int, int]
) -> None:
    if is_causal and sizes[0] == 1 and not VERSION_5:
        pytest.skip("transformers 4 lets a single row see the first key only")
    module = Module(of_module)
    expected = attend(None, *sizes, module=module, is_causal=is_causal, function=sdpa_attention_forward)
    assert_same(attend(None, *sizes, module=module, is_causal=is_causal), expected)


def test_without_a_mask_sliding_window_is_one() -> None:
    order = torch.ones(BATCH, 1, 20, 20, dtype=torch.bool).tril()
    assert_same(attend(None, sliding_window=5), attend(order & ~order.tril(-5)))
    around = ~order.tril(-5) & ~order.tril(-5).mT
    assert_same(attend(None, sliding_window=5, is_causal=False), attend(around))
    last = torch.arange(20).expand(BATCH, 1, 1, 20) >= 15
    assert_same(attend(None, 1, 20, sliding_window=5), attend(last, 1, 20))
    assert_same(attend(order, sliding_window=5), attend(order))  # a mask has it in it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masks_of_the_callers_own(dtype: torch.dtype) -> None:
    visible = torch.rand(BATCH, HEADS, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    visible |= torch.eye(20, dtype=torch.bool)
    added = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    assert_same(attend(added), attend(visible))
    assert_same(attend(added[..., :1, :, :].expand(-1, HEADS, -1, -1)), attend(visible[:, :1]))


def test_longer_mask_is_cut_to_the_keys() -> None:
    mask = expected_mask(CALLS["causal"])
    assert_same(attend(mask, 20, 15), attend(mask[..., :15], 20, 15))


@pytest.mark.parametrize("name", ["causal", "window", "packed", "right padding"])
def test_position_bias(name: str) -> None:
    bias = torch.randn(1, HEADS, 20, 20, dtype=torch.float64)
    mask = fa_ext.mask_function(**CALLS[name])
    added = bias.masked_fill(~expected_mask(CALLS[name]), float("-inf"))
    assert_same(attend(mask, position_bias=bias), attend(added))


def test_cu_seq_lens() -> None:
    lengths = torch.tensor([0, 5, 17, 20, 40, 51, 60], dtype=torch.int64)
    rows = torch.arange(60)
    sequence = torch.bucketize(rows, lengths[1:], right=True).view(BATCH, 20)
    same = sequence[:, None, :, None] == sequence[:, None, None]
    order = torch.ones(20, 20, dtype=torch.bool).tril()
    options: dict[str, Any] = {
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": 20,
        "max_length_k": 20,
    }
    assert_same(attend(None, **options), attend(same & order))
    assert_same(attend(fa_ext.mask_function(**CALLS["causal"]), **options), attend(same & order))
    assert_same(attend(None, is_causal=False, **options), attend(same))
    assert_same(attend(None, sliding_window=3, **options), attend(same & order & ~order.tril(-3)))


def test_indices() -> None:
    indices = torch.rand(BATCH, 20, 20, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :9]
    chosen = torch.zeros(BATCH, 20, 20, dtype=torch.bool).scatter(-1, indices, True)[:, None]
    order = expected_mask(CALLS["causal"])
    added = torch.zeros(order.shape, dtype=torch.float64).masked_fill(~order, torch.finfo(torch.float64).min)
    for mask in (order, fa_ext.mask_function(**CALLS["causal"])):
        assert_same(attend(mask, indices=indices), attend(order & chosen))
    both = (order & chosen).any(-1, keepdim=True)  # of rows without any key eager attention makes something else
    torch.testing.assert_close(
        attend(added, indices=indices)[0] * both.transpose(1, 2), attend(order & chosen)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_sinks(name: str) -> None:
    mask, sinks = fa_ext.mask_function(**CALLS[name]), torch.randn(HEADS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, 20, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = reference.attention(
        *(x.transpose(1, 2) for x in (q, k, v)), mask=expected_mask(CALLS[name]), sinks=sinks
    )
    per_head, _ = fa_ext.attention_function(Module(), q, k, v, mask, s_aux=sinks)
    torch.testing.assert_close(per_head, expected, rtol=1e-12, atol=1e-12)
    per_row = sinks[None, :, None, None].expand(BATCH, -1, 20, 1)
    by_row, _ = fa_ext.attention_function(Module(), q, k, v, mask, sinks=per_row)
    torch.testing.assert_close(by_row, expected, rtol=1e-12, atol=1e-12)


def test_queries_of_batch_one() -> None:
    q = torch.randn(1, HEADS, 5, HEAD_DIM)
    k, v = torch.randn(2, BATCH, HEADS, 7, HEAD_DIM)
    out, _ = fa_ext.attention_function(Module(False), q, k, v, None)
    expected, _ = fa_ext.attention_function(Module(False), q.expand(BATCH, -1, -1, -1), k, v, None)
    assert torch.equal(out, expected)


def test_dropout_drops() -> None:
    q, k, v = torch.randn(3, BATCH, HEADS, 20, HEAD_DIM)
    dropped, _ = fa_ext.attention_function(Module(), q, k, v, None, dropout=1.0)
    assert not dropped.any()


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (None, {"output_attentions": True}, "eager"),
        (None, {"head_mask": torch.ones(HEADS)}, "head_mask"),
        (None, {"block_indices": torch.zeros(1)}, "block_indices"),
        (None, {"block_table": torch.zeros(1)}, "paged"),
        (None, {"alibi": torch.ones(HEADS)}, "alibi must not be given: this attention does not know it"),
        (None, {"head_mask": torch.ones(HEADS), "alibi": torch.ones(HEADS)}, "2 constraints are not met"),
        (None, {"indices": torch.zeros(BATCH, 20, 1, dtype=torch.int64)}, "attention_mask must be given"),
        ("left padding", {"cu_seq_lens_q": torch.tensor([0, 60])}, "padding"),
        ("packed", {"cu_seq_lens_q": torch.tensor([0, 60])}, "9 sequences where it has 1"),
        ("union", {"cu_seq_lens_q": torch.tensor([0, 60])}, "a mask of its own"),
        ("causal", {"cu_seq_lens_q": torch.tensor([0, 60]), "position_bias": torch.zeros(20, 20)}, "position_bias"),
        (torch.ones(BATCH, 1, 20, 20, dtype=torch.int64), {}, "attention_mask must be"),
        (torch.ones(BATCH, 20, dtype=torch.bool), {}, "mask must"),
    ],
)
def test_what_cannot_be_taken_raises(mask: Any, options: dict[str, Any], message: str) -> None:
    if isinstance(mask, str):
        mask = fa_ext.mask_function(**{**CALLS, **OTHER_CALLS}[mask])
    with pytest.raises(InputError, match=message):
        attend(mask, **options)


def test_what_models_hand_on_changes_nothing() -> None:
    mask = expected_mask(CALLS["causal"])
    handed_on = {"position_ids": torch.arange(20)[None], "num_items_in_batch": torch.tensor(3), "use_cache": True}
    assert_same(attend(mask, **handed_on, output_attentions=False, alibi=None), attend(mask))


@pytest.mark.parametrize("name", ["flash_ext", "my_sdpa", "paged|x"])
def test_names_that_the_library_takes_for_its_own(name: str) -> None:
    with pytest.raises(InputError, match="must not contain"):
        fa_ext.register(name)
