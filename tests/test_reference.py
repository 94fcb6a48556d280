"""The specification is tested against what was there before it: torch.softmax, torch's SDPA, autograd, finite
differences, the published vectors of Philox, and for the combination of all options a loop over single numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_ext import reference

# Everything is float64 and sums at most some hundred terms of size 1 in another order: 1e-12 leaves three digits.
TOLERANCE: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
SOFTMAXES = [reference.naive_softmax, reference.safe_softmax, reference.online_softmax]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def randn(rng: torch.Generator, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_(grad)


def qkv(
    rng: torch.Generator,
    *,
    batch: int = 2,
    seqlen_q: int = 5,
    seqlen_k: int = 7,
    heads: int = 4,
    heads_kv: int = 2,
    head_dim: int = 3,
    head_dim_v: int = 2,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(rng, batch, seqlen_q, heads, head_dim, grad=grad),
        randn(rng, batch, seqlen_k, heads_kv, head_dim, grad=grad),
        randn(rng, batch, seqlen_k, heads_kv, head_dim_v, grad=grad),
    )


# ---- Softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 50), (0, 4), (3, 0)])
def test_softmax_equals_torch(softmax: Any, shape: tuple[int, ...], rng: torch.Generator) -> None:
    x = 5 * randn(rng, *shape)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), **TOLERANCE)


def test_only_the_naive_softmax_overflows() -> None:
    x = torch.tensor([1000.0, 999.0, -1000.0])
    assert reference.naive_softmax(x).isnan().any()
    for softmax in (reference.safe_softmax, reference.online_softmax):
        torch.testing.assert_close(softmax(x), torch.softmax(x, -1))


def test_softmax_of_minus_infinity() -> None:
    nothing = torch.full((2, 4), -math.inf)
    assert reference.safe_softmax(nothing).isnan().all()
    assert (reference.online_softmax(nothing) == 0).all()
    late = torch.tensor([-math.inf, -math.inf, 1.0, 2.0])
    torch.testing.assert_close(reference.online_softmax(late), torch.softmax(late, -1))


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize(("softmax", "loads"), list(zip(SOFTMAXES, [2, 3, 2], strict=True)))
def test_memory_accesses_per_element(softmax: Any, loads: int, length: int) -> None:
    accesses = reference.memory_accesses(softmax, length)
    assert accesses == (loads, 1)
    assert accesses.total == loads + 1


# ---- Merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_merge_of_two_blocks_is_attention_over_both(cut: int, rng: torch.Generator) -> None:
    q, k, v = qkv(rng)
    a = reference.attention(q, k[:, :cut], v[:, :cut], return_lse=True)
    b = reference.attention(q, k[:, cut:], v[:, cut:], return_lse=True)
    both = reference.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(reference.merge(*a, *b), both, **TOLERANCE)
    torch.testing.assert_close(reference.merge(*b, *a), both, **TOLERANCE)


def test_merge_is_associative_and_takes_packed_tensors(rng: torch.Generator) -> None:
    a, b, c = ((randn(rng, 6, 3, 2), 30 * randn(rng, 3, 6)) for _ in range(3))
    left = reference.merge(*reference.merge(*a, *b), *c)
    right = reference.merge(*a, *reference.merge(*b, *c))
    torch.testing.assert_close(left, right, **TOLERANCE)
    torch.testing.assert_close(left[1], torch.stack((a[1], b[1], c[1])).logsumexp(0), **TOLERANCE)


def test_merge_gradients_with_empty_rows(rng: torch.Generator) -> None:
    out_a, out_b = randn(rng, 1, 4, 1, 2, grad=True), randn(rng, 1, 4, 1, 2, grad=True)
    lse_a, lse_b = randn(rng, 1, 1, 4, grad=True), randn(rng, 1, 1, 4, grad=True)

    def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        # Row 0 is empty in a, row 1 in b, row 2 in both; row 3 in neither.
        lse_a = lse_a.masked_fill(torch.tensor([True, False, True, False]), -math.inf)
        lse_b = lse_b.masked_fill(torch.tensor([False, True, True, False]), -math.inf)
        out, lse = reference.merge(out_a, lse_a, out_b, lse_b)
        assert lse[..., 2].item() == -math.inf
        assert (out[:, 2] == 0).all()
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(merged, (out_a, lse_a, out_b, lse_b))


# ---- Tiles ----------------------------------------------------------------------------------------------------------

TILINGS = [(64, 64), (16, 8), (5, 7), (1, 1)]
BANDS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (3, 2)},
    {"causal": True, "window_size": (4, -1)},
    {"window_size": (-1, 0), "softmax_scale": -0.3},
]


@pytest.mark.parametrize(("block_q", "block_k"), TILINGS)
@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(17, 17), (9, 21), (21, 9), (4, 0), (0, 4)])
def test_tiles_equal_the_whole(
    block_q: int, block_k: int, band: dict[str, Any], seqlen_q: int, seqlen_k: int, rng: torch.Generator
) -> None:
    q, k, v = qkv(rng, seqlen_q=seqlen_q, seqlen_k=seqlen_k, grad=True)
    out, lse = reference.attention(q, k, v, return_lse=True, **band)
    dout, dlse = randn(rng, *out.shape), randn(rng, *lse.shape)
    finite_lse = lse.masked_fill(lse.isneginf(), 0.0)
    gradients = torch.autograd.grad((out * dout).sum() + (finite_lse * dlse).sum(), (q, k, v))

    q, k, v = (t.detach() for t in (q, k, v))
    tiled = reference.tiled_attention(q, k, v, block_q=block_q, block_k=block_k, **band)
    torch.testing.assert_close(tiled, (out.detach(), lse.detach()), **TOLERANCE)
    tiled_gradients = reference.tiled_attention_backward(
        dout, q, k, v, *tiled, dlse=dlse, block_q=block_q, block_k=block_k, **band
    )
    torch.testing.assert_close(tiled_gradients, gradients, **TOLERANCE)


def test_tiles_outside_the_band_are_never_touched(rng: torch.Generator) -> None:
    q, k, v = qkv(rng, seqlen_q=32, seqlen_k=32)
    band: dict[str, Any] = {"window_size": (3, 0), "block_q": 8, "block_k": 8}
    out, lse = reference.tiled_attention(q, k, v, **band)
    # Rows 16 to 23 see keys 13 to 23. NaN times a probability of zero is NaN: it would show.
    v[:, :8] = v[:, 24:] = k[:, :8] = k[:, 24:] = math.nan
    poisoned, poisoned_lse = reference.tiled_attention(q, k, v, **band)
    assert torch.equal(poisoned[:, 16:24], out[:, 16:24])
    assert torch.equal(poisoned_lse[..., 16:24], lse[..., 16:24])
    assert poisoned[:, :8].isnan().all()


# ---- The oracle -----------------------------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_oracle_equals_torch_sdpa(heads_kv: int, rng: torch.Generator) -> None:
    q, k, v = qkv(rng, heads_kv=heads_kv)
    mask = torch.rand(2, 1, 5, 7, generator=rng) < 0.7
    mask[..., 0] = True
    bias = randn(rng, 4, 1, 7)
    top_left = (None, q.shape[1] - k.shape[1])
    for ours, theirs in [
        ({}, {}),
        ({"softmax_scale": -1.5}, {"scale": -1.5}),
        ({"mask": mask}, {"attn_mask": mask}),
        ({"bias": bias}, {"attn_mask": bias}),
        ({"window": top_left}, {"is_causal": True}),
    ]:
        out: Any = reference.attention(q, k, v, **ours)
        torch.testing.assert_close(out, sdpa(q, k, v, **theirs), **TOLERANCE)


def test_causal_order_is_aligned_bottom_right(rng: torch.Generator) -> None:
    for seqlen_q, seqlen_k in [(3, 5), (5, 3), (4, 4)]:
        q, k, v = qkv(rng, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        full = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
        bottom_right, top_left = full.tril(seqlen_k - seqlen_q), full.tril()
        expected = reference.attention(q, k, v, mask=bottom_right, return_lse=True)
        assert_equal(reference.attention(q, k, v, causal=True, return_lse=True), expected)
        assert_equal(reference.attention(q, k, v, window=(None, 0), return_lse=True), expected)
        window = (None, seqlen_q - seqlen_k)
        expected = reference.attention(q, k, v, mask=top_left, return_lse=True)
        assert_equal(reference.attention(q, k, v, window=window, return_lse=True), expected)


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def everything(rng: torch.Generator, *, grad: bool = False) -> dict[str, Any]:
    """Every option at once, over q, k, v of qkv(): some rows see nothing, some have no sink to look at."""
    mask = torch.rand(2, 1, 5, 7, generator=rng) < 0.8
    mask[1, :, 2] = False
    return {
        "window_size": (3, 1),
        "softmax_scale": 0.8,
        "softcap": 1.5,
        "bias": randn(rng, 1, 4, 5, 7, grad=grad),
        "mask": mask,
        "alibi_slopes": torch.rand(2, 4, generator=rng, dtype=torch.float64),
        "sinks": torch.tensor([0.5, -1.0, -math.inf, 2.0], dtype=torch.float64, requires_grad=grad),
        "dropout_p": 0.25,
        "rng_state": torch.tensor([-(2**40) - 7, 2**33 + 5]),
        "seqused_q": torch.tensor([5, 4], dtype=torch.int32),
        "seqused_k": torch.tensor([3, 7], dtype=torch.int32),
    }


def row_by_hand(
    q: Tensor, k: Tensor, v: Tensor, b: int, h: int, i: int, o: dict[str, Any]
) -> tuple[list[float], float]:
    """One row of attention over Python's numbers, told by the definitions alone."""
    used_q, used_k = int(o["seqused_q"][b]), int(o["seqused_k"][b])
    group = q.shape[2] // k.shape[2]
    zeros = [0.0] * v.shape[3]
    if i >= used_q:
        return zeros, -math.inf
    keep = dropout_by_hand(o["rng_state"], b * q.shape[2] + h, i, k.shape[1], o["dropout_p"])
    weights = {}
    for j in range(used_k):
        distance = j - (i + used_k - used_q)
        if -o["window_size"][0] <= distance <= o["window_size"][1] and o["mask"][b, 0, i, j]:
            s = o["softmax_scale"] * sum(
                float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, h // group], strict=True)
            )
            s = o["softcap"] * math.tanh(s / o["softcap"])
            s -= float(o["alibi_slopes"][b, h]) * abs(distance)
            weights[j] = math.exp(s + float(o["bias"][0, h, i, j]))
    total = sum(weights.values()) + math.exp(float(o["sinks"][h]))
    if total == 0:
        return zeros, -math.inf
    kept = {j: weight / total / (1 - o["dropout_p"]) for j, weight in weights.items() if keep[j]}
    out = [math.fsum(p * float(v[b, j, h // group, d]) for j, p in kept.items()) for d in range(v.shape[3])]
    return out, math.log(total)


def dropout_by_hand(rng_state: Tensor, batch_head: int, row: int, seqlen_k: int, dropout_p: float) -> list[bool]:
    """One row of the keep mask, by the numbering of csrc/core/philox.h."""
    seed, offset = (int(x) % 2**64 for x in rng_state)
    keep = []
    for col in range(seqlen_k):
        row_group, col_group = (row >> 4) * 4 + (row >> 1 & 3), (col >> 4) * 4 + (col >> 1 & 3)
        counter = torch.tensor([col_group, row_group, batch_head, offset % 2**32])
        words = reference.philox4x32(counter, torch.tensor([seed % 2**32, seed >> 32])).tolist()
        halves = [word >> 16 if row % 2 else word & 0xFFFF for word in words]
        own = [byte for half in halves for byte in (half & 0xFF, half >> 8)]
        number = ((row >> 3 & 1) + (col >> 3 & 1) * 2) * 2 + col % 2
        tie = (1, 2, 3, 0)[number % 4]  # p1 ^ q1, ... for the first four; p1 ^ q3, ... for the others
        other = own[4 + tie] if number < 4 else own[4 + (tie + 2) % 4]
        keep.append(((own[number] & 0x7F) << 8 | (own[tie] ^ other)) >= round(dropout_p * 2**15))
    return keep


def test_oracle_with_every_option_equals_a_loop_over_numbers(rng: torch.Generator) -> None:
    q, k, v = qkv(rng)
    options = everything(rng)
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                expected_out, expected_lse = row_by_hand(q, k, v, b, h, i, options)
                torch.testing.assert_close(out[b, i, h].tolist(), expected_out, **TOLERANCE)
                assert math.isclose(lse[b, h, i].item(), expected_lse, rel_tol=1e-12, abs_tol=1e-12)
    assert (out[1, 2] == 0).all()  # sees nothing: only the sink is left, and head 2 has none
    torch.testing.assert_close(lse[1, :, 2], options["sinks"], **TOLERANCE)


def test_oracle_gradients_equal_finite_differences(rng: torch.Generator) -> None:
    q, k, v = qkv(rng, grad=True)
    options = everything(rng, grad=True)
    bias, sinks = options.pop("bias"), options.pop("sinks")

    def outputs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **options)
        return out, lse.nan_to_num(neginf=0.0)

    # Finite differences cannot step from a sink of -inf.
    sinks = sinks.detach().nan_to_num(neginf=-2.0).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (q, k, v, bias, sinks))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_oracle_is_the_same_on_cuda(rng: torch.Generator) -> None:
    def run(place: str) -> list[Tensor]:
        rng.manual_seed(20)
        q, k, v = (t.to(place).requires_grad_() for t in qkv(rng))
        options = {n: o.to(place) if isinstance(o, Tensor) else o for n, o in everything(rng).items()}
        out, lse = reference.attention(q, k, v, return_lse=True, **options)
        return [t.cpu() for t in (out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v)))]

    torch.testing.assert_close(run("cuda"), run("cpu"), **TOLERANCE)


def test_rows_that_see_nothing_have_gradients_of_zero(rng: torch.Generator) -> None:
    q, k, v = qkv(rng, seqlen_q=5, seqlen_k=3, grad=True)  # causal: rows 0 and 1 lie above the first key
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :2] == 0).all()
    assert lse[..., :2].isneginf().all()
    for result in (out[:, :2].sum(), lse[..., :2].sum()):
        for gradient in torch.autograd.grad(result, (q, k, v), retain_graph=True, allow_unused=True):
            assert gradient is None or (gradient == 0).all()
    dq, _, _ = torch.autograd.grad(out.sum() + lse[..., 2:].sum(), (q, k, v))
    assert (dq[:, :2] == 0).all()
    assert (dq[:, 2:] != 0).all()


def test_a_bias_of_minus_infinity_is_a_mask(rng: torch.Generator) -> None:
    q, k, v = qkv(rng, grad=True)
    mask = torch.rand(5, 7, generator=rng) < 0.5
    mask[3] = False
    bias = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~mask, -math.inf).requires_grad_()
    masked = reference.attention(q, k, v, mask=mask)
    biased = reference.attention(q, k, v, bias=bias)
    assert_equal(biased, masked)
    assert (biased[:, 3] == 0).all()
    gradients = torch.autograd.grad(biased.square().sum(), (q, k, v, bias))
    assert_equal(gradients[:3], torch.autograd.grad(masked.square().sum(), (q, k, v)))
    assert (gradients[3][~mask] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_beyond_the_lengths_in_use_is_seen(causal: bool, rng: torch.Generator) -> None:
    q, k, v = qkv(rng, batch=3)
    # The last lengths are more than there is, and mean all of it.
    seqused = {"seqused_q": torch.tensor([3, 0, 50]), "seqused_k": torch.tensor([4, 7, 90])}
    options: dict[str, Any] = {"causal": causal, "sinks": randn(rng, 4), "return_lse": True}
    short = reference.attention(q[:1, :3], k[:1, :4], v[:1, :4], **options)
    whole = reference.attention(q[2:], k[2:], v[2:], **options)
    q[0, 3:] = k[0, 4:] = v[0, 4:] = math.nan
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, lse = reference.attention(q, k, v, **options, **seqused)
    torch.testing.assert_close((out[:1, :3], lse[:1, :, :3]), short, **TOLERANCE)
    torch.testing.assert_close((out[2:], lse[2:]), whole, **TOLERANCE)
    assert (out[0, 3:] == 0).all()
    assert (out[1] == 0).all()
    assert lse[0, :, 3:].isneginf().all()
    assert lse[1].isneginf().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
    assert all((rest == 0).all() for rest in (dq[0, 3:], dk[0, 4:], dv[0, 4:], dq[1], dk[1], dv[1]))


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads": 0, "heads_kv": 0}], ids=str
)
def test_every_size_may_be_zero(sizes: dict[str, int], rng: torch.Generator) -> None:
    q, k, v = qkv(rng, grad=True, **sizes)
    out, lse = reference.attention(q, k, v, causal=True, dropout_p=0.5, rng_state=torch.tensor([1, 2]), return_lse=True)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


def test_varlen_equals_a_padded_batch(rng: torch.Generator) -> None:
    q, k, v = qkv(rng, grad=True)
    options = everything(rng)
    lengths_q, lengths_k = options.pop("seqused_q").tolist(), options.pop("seqused_k").tolist()
    padded = reference.attention(
        q, k, v, seqused_q=torch.tensor(lengths_q), seqused_k=torch.tensor(lengths_k), return_lse=True, **options
    )
    padded_gradients = torch.autograd.grad(padded[0].square().sum(), (q, k, v))

    def pack(t: Tensor, lengths: list[int], dim: int = 0) -> Tensor:
        return torch.cat([t[b].narrow(dim, 0, n) for b, n in enumerate(lengths)], dim)

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    packed_q = torch.cat((pack(q, lengths_q), randn(rng, 2, 4, 3)))  # two rows that belong to no sequence
    packed_k, packed_v = pack(k, lengths_k), pack(v, lengths_k)
    out, lse = reference.attention_varlen(
        packed_q, packed_k, packed_v, ends(lengths_q), ends(lengths_k), return_lse=True, **options
    )
    torch.testing.assert_close(out[:-2], pack(padded[0], lengths_q), **TOLERANCE)
    torch.testing.assert_close(lse[:, :-2], pack(padded[1], lengths_q, 1), **TOLERANCE)
    assert (out[-2:] == 0).all()
    assert lse[:, -2:].isneginf().all()
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), padded_gradients, **TOLERANCE)


def test_varlen_without_sequences(rng: torch.Generator) -> None:
    q = randn(rng, 3, 4, 2, grad=True)
    out, lse = reference.attention_varlen(q, q[:, :1], q[:, :1], torch.tensor([0], dtype=torch.int32), return_lse=True)
    assert (out == 0).all()
    assert lse.isneginf().all()
    assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


# ---- Dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 7 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> Tensor:
        return torch.tensor([int(word, 16) for word in text.split()])

    assert reference.philox4x32(words(counter), words(key)).tolist() == words(expected).tolist()


def test_dropout_bits_follow_the_numbering_of_the_kernels() -> None:
    state = torch.tensor([-3, 2**35 + 11])
    keep = reference.dropout_keep_mask(state, 2, 3, 19, 35, 0.4)
    for b, h, i in [(0, 0, 0), (0, 2, 7), (1, 0, 8), (1, 2, 15), (1, 1, 18)]:
        assert keep[b, h, i].tolist() == dropout_by_hand(state, b * 3 + h, i, 35, 0.4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_dropout_drops_its_share_and_keeps_the_mean(dropout_p: float) -> None:
    keep = reference.dropout_keep_mask(torch.tensor([5, 0]), 2, 4, 256, 256, dropout_p)
    # The share of n independent draws has standard deviation sqrt(p (1 - p) / n): six of them, and exact at 0 and 1.
    assert abs(keep.double().mean().item() - (1 - dropout_p)) <= 6 * math.sqrt(
        dropout_p * (1 - dropout_p) / keep.numel()
    )
    for head in range(1, 4):
        agree = (keep[0, 0] == keep[0, head]).double().mean().item()
        expected = (1 - dropout_p) ** 2 + dropout_p**2
        assert abs(agree - expected) <= 6 * math.sqrt(0.25 / keep[0, 0].numel())


def test_dropout_depends_on_all_of_the_state_and_not_on_the_lengths() -> None:
    def keep(seed: int, offset: int, seqlen: int = 64) -> Tensor:
        return reference.dropout_keep_mask(torch.tensor([seed, offset]), 1, 1, seqlen, seqlen, 0.5)

    assert torch.equal(keep(1, 2, 30), keep(1, 2)[..., :30, :30])
    for other in (keep(2, 2), keep(1 + 2**32, 2), keep(1, 3)):
        assert not torch.equal(other, keep(1, 2))


def test_dropout_of_everything_and_without_a_state(rng: torch.Generator) -> None:
    q, k, v = qkv(rng, grad=True)
    out = reference.attention(q, k, v, dropout_p=1.0, rng_state=torch.tensor([1, 2]))
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))
    with pytest.raises(ValueError, match="rng_state"):
        reference.attention(q, k, v, dropout_p=0.5)


# ---- The error rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_plain_torch_in_that_dtype(dtype: torch.dtype, rng: torch.Generator) -> None:
    q, k, v = (t.to(dtype) for t in qkv(rng, seqlen_q=40, seqlen_k=60, heads_kv=4, head_dim=16, head_dim_v=16))
    out, lse = reference.attention(q, k, v, return_lse=True, dtype=dtype)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    plain_q, plain_k, plain_v = (t.transpose(1, 2) for t in (q, k, v))
    plain = torch.softmax(plain_q / 4 @ plain_k.transpose(-1, -2), -1) @ plain_v
    # The same operations, up to the order of sums inside torch: a rounding of a probability or of the output may flip.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, plain.transpose(1, 2), rtol=eps, atol=eps)
    # An option in a wider type stays in it, and the products stay in theirs.
    bias = randn(rng, 40, 60)
    biased = torch.softmax(plain_q / 4 @ plain_k.transpose(-1, -2) + bias, -1).to(dtype) @ plain_v
    out_biased = reference.attention(q, k, v, bias=bias, dtype=dtype)
    torch.testing.assert_close(out_biased, biased.transpose(1, 2), rtol=eps, atol=eps)
    # The error is that of the dtype: at least a tenth of its epsilon, at most ten of them (outputs are of size 1).
    error = (out.double() - reference.attention(q, k, v)).abs().max().item()
    assert 0.1 * eps < error < 10 * eps


def test_error_bound() -> None:
    exact = torch.tensor([1.0, -2.0, -math.inf], dtype=torch.float64)
    low = torch.tensor([1.0, -2.25, 7.0])
    rounding = 2 * 2.0**-7  # 1 + 0.3 - 0.3 in bfloat16 is 1 or a neighbour at most 2^-7 away, -2 as well
    bound = reference.error_bound(exact, low, torch.bfloat16, 3.0)
    assert 0.75 <= bound <= 0.75 + rounding
    assert reference.error_bound(exact, low, torch.float64) < 1e-8  # float32's error, scaled down
    assert reference.error_bound(exact[:0], low[:0], torch.float16) == 0.0
    with pytest.raises(ValueError, match="overflow"):
        reference.error_bound(exact, torch.tensor([math.inf, -2.0, 0.0]), torch.float16)
