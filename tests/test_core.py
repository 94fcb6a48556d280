"""csrc/core, which every kernel is built on, through the hooks in _C: no kernel and no tensor takes part."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import combinations, groupby, pairwise

import pytest
import torch

from flash_attn_ext import reference
from flash_attn_ext._C import core

PROBLEMS = 3000
WAVE = 64  # Round::kMost
INF = math.inf

Interval = tuple[int, int]


def interval(members: Iterable[int]) -> Interval | None:
    """The smallest interval around some integers; None around none."""
    members = list(members)
    return (min(members), max(members) + 1) if members else None


def normal(x: Interval) -> Interval | None:
    """All empty intervals are one."""
    return x if x[0] < x[1] else None


class Problem:
    """A band with its definition beside it: sees[i] is the set of keys of row i."""

    def __init__(self, rng: random.Random) -> None:
        self.seqlen_q, self.seqlen_k = rng.randint(0, 24), rng.randint(0, 24)
        self.left, self.right = (rng.choice((None, 0, rng.randint(-30, 30))) for _ in range(2))
        self.band = core.Band(self.seqlen_q, self.seqlen_k, self.left, self.right)
        shift = self.seqlen_k - self.seqlen_q
        left, right = (INF if side is None else side for side in (self.left, self.right))
        self.sees = [
            {j for j in range(self.seqlen_k) if i + shift - left <= j <= i + shift + right}
            for i in range(self.seqlen_q)
        ]

    def __repr__(self) -> str:
        return f"Band({self.seqlen_q}, {self.seqlen_k}, {self.left}, {self.right})"


def problems(seed: int) -> Iterator[tuple[Problem, random.Random]]:
    rng = random.Random(seed)
    for _ in range(PROBLEMS):
        yield Problem(rng), rng


def draw_range(rng: random.Random, size: int) -> Interval:
    begin = rng.randint(0, size)
    return begin, rng.randint(begin, size)


def test_the_drawn_bands_are_of_every_kind() -> None:
    drawn = [problem for problem, _ in problems(0)]
    assert any(problem.seqlen_q == 0 for problem in drawn)
    assert any(problem.seqlen_k == 0 for problem in drawn)
    rows = [(len(seen), problem.seqlen_k) for problem in drawn for seen in problem.sees]
    for kind in (lambda n, k: n == 0 < k, lambda n, k: 0 < n < k, lambda n, k: n == k > 0):
        assert sum(kind(n, k) for n, k in rows) > PROBLEMS


def test_band_contains_what_its_definition_says() -> None:
    for problem, _ in problems(1):
        band = problem.band
        for i, seen in enumerate(problem.sees):
            assert {j for j in range(problem.seqlen_k) if band.contains(i, j)} == seen, (problem, i)
            assert set(range(band.lo(i), band.hi(i))) == seen, (problem, i)
        assert all(not band.contains(i, j) for i in range(problem.seqlen_q) for j in (-1, problem.seqlen_k)), problem


def test_band_ends_never_decrease() -> None:
    for problem, _ in problems(2):
        rows = range(problem.seqlen_q)
        for ends in ([problem.band.lo(i) for i in rows], [problem.band.hi(i) for i in rows]):
            assert ends == sorted(ends), problem


def test_band_intervals_of_row_blocks() -> None:
    for problem, rng in problems(3):
        i0, i1 = draw_range(rng, problem.seqlen_q)
        rows = problem.sees[i0:i1]
        assert normal(problem.band.any(i0, i1)) == interval(set().union(*rows)), (problem, i0, i1)
        every = interval(set.intersection(*rows)) if rows else None
        assert normal(problem.band.every(i0, i1)) == every, (problem, i0, i1)


def test_band_intervals_of_key_blocks() -> None:
    for problem, rng in problems(4):
        j0, j1 = draw_range(rng, problem.seqlen_k)
        keys = set(range(j0, j1))
        some = interval(i for i, seen in enumerate(problem.sees) if seen & keys)
        every = interval(i for i, seen in enumerate(problem.sees) if keys and keys <= seen)
        assert normal(problem.band.rows_any(j0, j1)) == some, (problem, j0, j1)
        assert normal(problem.band.rows_every(j0, j1)) == every, (problem, j0, j1)


def test_no_row_sees_the_whole_of_a_key_block_that_ends_behind_the_keys() -> None:
    for problem, rng in problems(5):
        j0 = rng.randint(0, problem.seqlen_k)
        j1 = problem.seqlen_k + rng.randint(1, 8)
        assert normal(problem.band.rows_every(j0, j1)) is None, (problem, j0, j1)


def test_key_blocks_split_the_keys_of_a_row_block() -> None:
    full_blocks = edge_blocks = 0
    for problem, rng in problems(6):
        i0, i1 = draw_range(rng, problem.seqlen_q)
        size = rng.choice((1, 2, 3, 4, 8))
        begin, full_begin, full_end, end = core.key_blocks(problem.band.any(i0, i1), problem.band.every(i0, i1), size)
        rows = problem.sees[i0:i1]
        block_keys = [set(range(b * size, (b + 1) * size)) for b in range(end)]
        assert begin <= full_begin <= full_end <= end, (problem, i0, i1, size)
        assert set().union(*rows) <= set().union(*block_keys[begin:]), (problem, i0, i1, size)
        for keys in block_keys[full_begin:full_end]:
            assert all(keys <= seen for seen in rows), (problem, i0, i1, size)
        # Every block that could go without element masks does, and no block is visited that no row sees.
        for keys in block_keys[begin:full_begin] + block_keys[full_end:]:
            assert not all(keys <= seen for seen in rows), (problem, i0, i1, size)
            assert any(keys & seen for seen in rows), (problem, i0, i1, size)
        full_blocks += full_end - full_begin
        edge_blocks += end - begin - (full_end - full_begin)
    assert min(full_blocks, edge_blocks) > 1000


def test_tile_schedule_covers_every_tile_once() -> None:
    rng = random.Random(7)
    for _ in range(PROBLEMS):
        batch, heads = rng.randint(0, 4), rng.randint(0, 5)
        seqlen, block_rows = rng.randint(0, 40), rng.randint(1, 16)
        tiles = [tuple(tile) for tile in core.tile_schedule(batch, heads, seqlen, block_rows)]
        blocks = math.ceil(seqlen / block_rows)
        assert sorted(tiles) == [(b, h, r) for b in range(batch) for h in range(heads) for r in range(blocks)]
        # The last rows, which are the longest tasks under a causal mask, come first.
        assert all(first[2] >= second[2] for first, second in pairwise(tiles))


@pytest.mark.parametrize("order", ["first", "last", "turns", "rounds"])
def test_grid_schedule_covers_every_tile_once(order: str) -> None:
    rng = random.Random(9)
    longest = 150 if order == "rounds" else 40  # several waves
    for problem in range(PROBLEMS // (40 if order == "rounds" else 3)):
        batch, block_rows, run = rng.randint(1, 4), rng.randint(1, 16), rng.randint(1, 3)
        block_rows = 1 if order == "rounds" else block_rows
        heads, group = run * rng.randint(1, 5), rng.randint(1, 7)
        lengths = [rng.randint(0, longest) for _ in range(batch)] if problem % 2 else [rng.randint(0, longest)] * batch
        starts = [sum(lengths[:b]) for b in range(batch + 1)]
        packed = starts if problem % 2 else []
        tiles = core.grid_schedule(batch, heads, lengths[0], block_rows, packed, starts[-1], group, order, run)
        # Numbers of a packed schedule that lie past a sequence's end are passed over by kernels.
        tiles = [tuple(tile) for tile in tiles if 0 <= tile[2] < math.ceil(lengths[tile[0]] / block_rows)]
        expected = {(b, h, r) for b in range(batch) for h in range(heads) for r in range(-(-lengths[b] // block_rows))}
        assert len(tiles) == len(expected)
        assert set(tiles) == expected
        # What takes turns relies on it: a head's blocks come in order,
        for b, h in {tile[:2] for tile in tiles}:
            blocks = [tile[2] for tile in tiles if tile[:2] == (b, h)]
            alternates = heads % (2 * run) == 0
            last_first = h // run % 2 == 0 and alternates if order == "turns" else order == "last"
            assert blocks == sorted(blocks, reverse=last_first)
        if order == "rounds":  # the blocks of a wave come next to each other,
            for (b, h, wave), tickets in groupby(enumerate(tiles), lambda x: (*x[1][:2], x[1][2] // WAVE)):
                assert len(list(tickets)) == min(WAVE, math.ceil(lengths[b] / block_rows) - wave * WAVE), (b, h)
        # and so do the heads of a run that share keys.
        for b, first, r in {(b, h // run * run, r) for b, h, r in tiles}:
            sharing = [h for h in (tile[1] for tile in tiles if tile[::2] == (b, r)) if h // run * run == first]
            assert sharing == sorted(sharing)


def test_blocks_that_go_round_wait_for_earlier_steps_alone() -> None:
    rng = random.Random(12)
    for _ in range(PROBLEMS // 20):
        key_blocks, query_blocks = rng.choice((rng.randint(1, 150), 4, 8, 16, 32, 64, 128)), rng.randint(1, 150)
        walks = core.round_walks(key_blocks, query_blocks)
        waves = {}
        for block, (first, members, _, _) in enumerate(walks):
            waves.setdefault(first, []).append(block)
            assert members in (1, 4, 8, 16, 32, 64)
            assert members <= query_blocks
            assert members == 1 or key_blocks % members == 0
        assert all(blocks == list(range(first, first + walks[first][1])) for first, blocks in waves.items())
        # By number, the last one begins at the last query block, and no two at the same.
        for blocks in waves.values():
            begins = [walks[block][2] for block in blocks]
            assert begins == sorted(set(begins))
            assert begins[0] >= 0
            assert begins[-1] == query_blocks - 1
        for i in range(query_blocks):
            order = sorted(range(key_blocks), key=lambda block: walks[block][3][i])
            assert [walks[block][3][i] for block in order] == list(range(key_blocks))
            for earlier, later in pairwise(order):
                if walks[earlier][0] != walks[later][0]:
                    assert walks[earlier][0] < walks[later][0]  # of an earlier wave
                    continue
                steps = [(walks[block][2] - i) % query_blocks for block in (earlier, later)]
                assert steps[0] < steps[1]
                # Up to the first query block, a key block waits for lower numbers, which have lower tickets.
                if i <= walks[later][2]:
                    assert earlier < later


def test_grid_schedule_has_no_small_last_group() -> None:
    """A group's tiles have the block slowest: the last group would begin with its longest tiles while others end."""
    rng = random.Random(11)
    for _ in range(PROBLEMS):
        batch, heads, count = rng.randint(1, 6), rng.randint(1, 12), rng.randint(1, 20)
        pairs, blocks = batch * heads, rng.randint(2, 4)
        tiles = core.grid_schedule(batch, heads, blocks, 1, [], 0, count, "first")
        firsts = [tile[2] == 0 for tile in tiles]
        sizes = [len(list(run)) for first, run in groupby(firsts) if first]
        assert sum(sizes) == pairs
        assert sizes[0] >= min(count, pairs)
        assert set(sizes[:-1]) <= {sizes[0]}
        assert sizes[0] - sizes[-1] < max(1, pairs // count)


def test_packed_schedule_stays_inside_whatever_the_lengths() -> None:
    rng = random.Random(10)
    for _ in range(PROBLEMS):
        batch = rng.randint(1, 5)
        starts = [rng.randint(-50, 300) for _ in range(batch + 1)]
        for b, h, _ in core.grid_schedule(batch, 2, 0, 16, starts, 200, 1, rng.choice(("first", "turns"))):
            assert 0 <= b < batch
            assert 0 <= h < 2


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that its authors publish with Random123, 7 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    counter_words, key_words, words = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert core.philox4x32(counter_words, key_words) == words


def dropout_halves(words: list[int]) -> list[int]:
    """What a call gives its sixteen elements: the element's own byte above its tie byte."""
    values = [value for odd_row in (False, True) for value in core.dropout_row_values(words, odd_row)]
    return [half for value in values for half in (value & 0xFFFF, value >> 16)]


def rank(vectors: Iterable[int]) -> int:
    """Of vectors over the field of two elements, each the bits of an integer."""
    basis: list[int] = []
    for vector in vectors:
        for other in basis:
            vector = min(vector, vector ^ other)
        if vector:
            basis.append(vector)
    return len(basis)


def test_dropout_values_of_any_two_elements_of_a_call_are_independent() -> None:
    rng = random.Random(12)
    units = [dropout_halves([(1 << bit) >> 32 * i & 0xFFFFFFFF for i in range(4)]) for bit in range(128)]
    # Values are linear in the bits of a call, exclusive or being the sum: they are known by those of single bits.
    for _ in range(100):
        call = rng.getrandbits(128)
        expected = [0] * 16
        for bit in range(128):
            if call >> bit & 1:
                expected = [a ^ b for a, b in zip(expected, units[bit], strict=True)]
        assert dropout_halves([call >> 32 * i & 0xFFFFFFFF for i in range(4)]) == expected
    # Which bits of a call are summed up in each bit of an element: independent where no sum of such sums is empty.
    sums = [[sum((unit[i] >> bit & 1) << n for n, unit in enumerate(units)) for bit in range(16)] for i in range(16)]
    for one, other in combinations(sums, 2):
        assert rank(one + other) == 32


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-1, 3), (2**62 + 12345, 2**40 + 7)])
def test_dropout_bits_are_those_of_the_specification(seed: int, offset: int) -> None:
    batch, heads, rows, cols = 2, 3, 40, 37
    bits = torch.tensor(
        [
            [
                [[core.dropout_bits(seed, offset, heads, b, h, i, j) for j in range(cols)] for i in range(rows)]
                for h in range(heads)
            ]
            for b in range(batch)
        ]
    )
    # Of 2^15 values, 8,880 draws are expected to hit 7,778.5, with a standard deviation of 27.7: six of them.
    assert abs(bits.unique().numel() - 7778.5) < 6 * 27.7
    for p in (0.0, 1e-6, 0.1, 0.5, 0.999, 1.0):
        kept = reference.dropout_keep_mask(torch.tensor([seed, offset]), batch, heads, rows, cols, p)
        assert torch.equal(bits >= core.dropout_threshold(p), kept)


@pytest.mark.parametrize(
    ("p", "threshold", "scale"), [(0.0, 0, 1.0), (0.5, 2**14, 2.0), (2**-15, 1, 1 / (1 - 2**-15)), (1.0, 2**15, 0.0)]
)
def test_dropout_threshold_and_scale(p: float, threshold: int, scale: float) -> None:
    assert core.dropout_threshold(p) == threshold
    assert core.dropout_scale(p) == scale


def scores_with_gaps(rng: random.Random, count: int) -> list[float]:
    return [rng.choice((-INF, rng.gauss(0, 30), rng.gauss(0, 1))) for _ in range(count)]


def logsumexp(scores: list[float]) -> float:
    return torch.tensor([-INF, *scores], dtype=torch.float64).logsumexp(0).item()


def row_state(scores: list[float], rng: random.Random) -> core.RowState:
    """Scores taken in block by block, in the way of the kernels."""
    state = core.RowState()
    while scores:
        size = rng.randint(1, 6)
        block, scores = scores[:size], scores[size:]
        state.update_max(max(block))
        m = 0.0 if state.m == -INF else state.m
        state.l += sum(math.exp(score - m) for score in block)
    return state


def test_row_state_is_the_log_sum_exp_of_all_its_blocks() -> None:
    rng = random.Random(8)
    for _ in range(PROBLEMS):
        scores = scores_with_gaps(rng, rng.randint(0, 30))
        state = row_state(scores, rng)
        expected = logsumexp(scores)
        assert state.lse() == pytest.approx(expected, rel=1e-13, abs=1e-13)
        inverse = 0.0 if expected == -INF else math.exp(state.m - expected)
        assert state.inverse_sum() == pytest.approx(inverse, rel=1e-12)
        sink = rng.choice((-INF, rng.gauss(0, 30)))
        state.add_sink(sink)
        assert state.lse() == pytest.approx(logsumexp([*scores, sink]), rel=1e-13, abs=1e-13)


def test_row_state_joins_parts_of_a_row() -> None:
    rng = random.Random(9)
    for _ in range(PROBLEMS):
        a, b = (scores_with_gaps(rng, rng.randint(0, 20)) for _ in range(2))
        state, other = row_state(a, rng), row_state(b, rng)
        sums = state.l, other.l
        factors = state.join(other)
        assert state.m == max([-INF, *a, *b])
        assert state.lse() == pytest.approx(logsumexp(a + b), rel=1e-13, abs=1e-13)
        assert state.l == pytest.approx(factors[0] * sums[0] + factors[1] * sums[1], rel=1e-13)


def test_row_state_returns_the_factor_for_what_has_been_summed() -> None:
    state = core.RowState()
    assert state.update_max(-INF) == 0.0
    assert state.update_max(2.0) == 0.0
    state.l = 1.0
    assert state.update_max(1.0) == 1.0
    assert state.update_max(5.0) == pytest.approx(math.exp(-3), rel=1e-15)
    assert state.l == pytest.approx(math.exp(-3), rel=1e-15)


def test_row_state_passes_nan_on() -> None:
    state = row_state([1.0, math.nan, 2.0], random.Random(0))
    assert math.isnan(state.l)
    other = row_state([3.0], random.Random(0))
    other.join(state)
    assert math.isnan(other.lse())


def test_merge_of_two_blocks() -> None:
    rng = random.Random(10)
    for _ in range(PROBLEMS):
        a, b = (rng.choice((-INF, rng.gauss(0, 300), rng.gauss(0, 1))) for _ in range(2))
        lse, weight_a, weight_b = core.merge(a, b)
        expected = logsumexp([a, b])
        assert lse == pytest.approx(expected, rel=1e-13, abs=1e-13)
        if expected == -INF:
            assert (weight_a, weight_b) == (0.0, 0.0)
        else:
            assert weight_a == pytest.approx(math.exp(a - expected), rel=1e-12)
            assert weight_a + weight_b == pytest.approx(1.0, rel=1e-15)


def test_softcap_and_its_gradient() -> None:
    rng = random.Random(11)
    for _ in range(PROBLEMS):
        score, cap, step = rng.gauss(0, 20), rng.uniform(0.5, 50), 1e-6
        capped = core.softcap(score, cap)
        assert capped == pytest.approx(cap * math.tanh(score / cap), rel=1e-15)
        slope = (core.softcap(score + step, cap) - core.softcap(score - step, cap)) / (2 * step)
        # Differences of values up to 50 leave 50 * 2^-52 / 1e-6 of rounding.
        assert core.softcap_gradient(capped, cap) == pytest.approx(slope, abs=2e-8)


def test_alibi_penalises_the_distance_on_both_sides() -> None:
    assert core.alibi(0.5, 0.0) == 0.0
    assert core.alibi(0.5, 3.0) == core.alibi(0.5, -3.0) == -1.5
