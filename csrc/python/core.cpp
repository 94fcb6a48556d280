#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "../core/band.h"
#include "../core/philox.h"
#include "../core/schedule.h"
#include "../core/score.h"
#include "../core/softmax.h"
#include "module.h"

// csrc/core as Python sees it, so that tests can prove it on any machine. An interval is (begin, end).

namespace py = pybind11;
using namespace pybind11::literals;

namespace fae::python {
namespace {

using Pair = std::pair<int64_t, int64_t>;

Pair pair_of(const Interval& x) { return {x.begin, x.end}; }

void bind_band(py::module_& m) {
  py::class_<Band>(m, "Band")
      .def(py::init([](int64_t seqlen_q, int64_t seqlen_k, std::optional<int64_t> left, std::optional<int64_t> right) {
             return Band(seqlen_q, seqlen_k, left.value_or(kUnlimited), right.value_or(kUnlimited));
           }),
           "seqlen_q"_a, "seqlen_k"_a, "window_left"_a = py::none(), "window_right"_a = py::none())
      .def("lo", &Band::lo, "row"_a)
      .def("hi", &Band::hi, "row"_a)
      .def("contains", &Band::contains, "row"_a, "col"_a)
      .def("any", [](const Band& band, int64_t i0, int64_t i1) { return pair_of(band.any(i0, i1)); })
      .def("every", [](const Band& band, int64_t i0, int64_t i1) { return pair_of(band.every(i0, i1)); })
      .def("rows_any", [](const Band& band, int64_t j0, int64_t j1) { return pair_of(band.rows_any(j0, j1)); })
      .def("rows_every", [](const Band& band, int64_t j0, int64_t j1) { return pair_of(band.rows_every(j0, j1)); });
}

void bind_schedule(py::module_& m) {
  m.def(
      "key_blocks",
      [](Pair any, Pair every, int64_t block_cols) {
        const KeyBlocks<int64_t> blocks({any.first, any.second}, {every.first, every.second}, block_cols);
        return std::array{blocks.begin, blocks.full_begin, blocks.full_end, blocks.end};
      },
      "any"_a, "every"_a, "block_cols"_a, "[begin, full_begin, full_end, end] of KeyBlocks");
  m.def(
      "tile_schedule",
      [](int64_t batch, int64_t heads, int64_t seqlen, int64_t block_rows) {
        const TileSchedule schedule(batch, heads, seqlen, block_rows);
        std::vector<std::array<int64_t, 3>> tiles;
        for (int64_t i = 0; i < schedule.size(); ++i)
          tiles.push_back({schedule[i].batch, schedule[i].head, schedule[i].block});
        return tiles;
      },
      "batch"_a, "heads"_a, "seqlen"_a, "block_rows"_a, "[batch, head, block] of every tile, in order");
  m.def(
      "grid_schedule",
      [](int64_t batch, int64_t heads, int64_t seqlen, int64_t block_rows, const std::vector<int32_t>& cu_seqlens,
         int64_t total, int64_t group, const std::string& order, int64_t run) {
        GridSchedule schedule(batch, heads, seqlen, block_rows, cu_seqlens.empty() ? nullptr : cu_seqlens.data(),
                              total);
        schedule.last_first = order == "last";
        if (order == "rounds") schedule.wave = Round::kMost;
        if (order == "turns" || order == "rounds")
          schedule.take_turns(run, group, 2 * group, order == "turns");
        else
          schedule.group_pairs(group, run);
        std::vector<std::array<int64_t, 3>> tiles;
        const auto find = [](const PackedBlocks& blocks, int32_t number) { return blocks[number]; };
        for (int64_t i = 0; i < schedule.size(); ++i) {
          const Tile tile = schedule.tile<true>(static_cast<uint32_t>(i), find);
          tiles.push_back({tile.batch, tile.head, tile.block});
        }
        return tiles;
      },
      "batch"_a, "heads"_a, "seqlen"_a, "block_rows"_a, "cu_seqlens"_a, "total"_a, "group"_a, "order"_a, "run"_a = 1,
      "[batch, head, block] of every task of a grid, in order; packed where cu_seqlens is not empty. order: 'first' or "
      "'last' block of a head first, or what 'turns' of runs of `run` heads need, or blocks that go round in 'rounds'. "
      "group: of pairs of batch and run, so many go together or, in turns, up to twice as many.");
  m.def(
      "round_walks",
      [](int key_blocks, int query_blocks) {
        std::vector<std::tuple<int, int, int, std::vector<int>>> walks;
        for (int block = 0; block < key_blocks; ++block) {
          const Round round(block, Round::size(key_blocks, query_blocks), query_blocks);
          std::vector<int> visits;
          for (int i = 0; i < query_blocks; ++i) visits.push_back(round.visit(block, i));
          walks.emplace_back(round.first, round.members, round.begin(block), visits);
        }
        return walks;
      },
      "key_blocks"_a, "query_blocks"_a,
      "Of every key block: first block and size of its wave, the query block where it begins, and its "
      "visit's number at each.");
}

void bind_dropout(py::module_& m) {
  m.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        Philox4 x[1] = {{{counter[0], counter[1], counter[2], counter[3]}}};
        philox4x32(x, key[0], key[1]);
        return std::to_array(x[0].word);
      },
      "counter"_a, "key"_a);
  m.def(
      "dropout_row_values",
      [](std::array<uint32_t, 4> words, bool odd_row) {
        const Philox4 call{{words[0], words[1], words[2], words[3]}};
        return std::to_array(DropoutBits::row_values(DropoutBits::row_bytes(call, odd_row)).word);
      },
      "words"_a, "odd_row"_a, "What the rows of one parity make of a call: two elements a word.");
  m.def(
      "dropout_bits",
      [](int64_t seed, int64_t offset, int64_t heads, int64_t batch, int64_t head, int64_t row, int64_t col) {
        const int64_t rng_state[2] = {seed, offset};
        Problem p;
        p.heads = heads;
        p.rng_state = rng_state;
        return dropout_bits(p, batch, head).bits(row, col);
      },
      "seed"_a, "offset"_a, "heads"_a, "batch"_a, "head"_a, "row"_a, "col"_a);
  m.def("dropout_threshold", [](double dropout_p) { return dropout_threshold(dropout_p); });
  m.def("dropout_scale", [](double dropout_p) { return dropout_scale(dropout_p); });
}

void bind_softmax(py::module_& m) {
  using State = RowState<double>;
  py::class_<State>(m, "RowState")
      .def(py::init())
      .def_readwrite("m", &State::m)
      .def_readwrite("l", &State::l)
      .def("update_max", &State::update_max, "block_max"_a)
      .def(
          "join",
          [](State& state, const State& other) {
            const auto [mine, theirs] = state.join(other);
            return std::array{mine, theirs};
          },
          "other"_a, "[factor for what this state has summed, factor for the other's]")
      .def("add_sink", &State::add_sink, "sink"_a)
      .def("lse", &State::lse)
      .def("inverse_sum", &State::inverse_sum);
  m.def(
      "merge",
      [](double a, double b) {
        const Merge<double> joined = merge(a, b);
        return std::array{joined.lse, joined.weight_a, joined.weight_b};
      },
      "lse_a"_a, "lse_b"_a, "[lse, weight_a, weight_b]");
}

void bind_score(py::module_& m) {
  m.def("softcap", [](double score, double cap) { return apply_softcap(score, cap); }, "score"_a, "softcap"_a);
  m.def(
      "softcap_gradient", [](double capped, double cap) { return softcap_gradient(capped, cap); }, "capped"_a,
      "softcap"_a);
  m.def("alibi", [](double slope, double distance) { return alibi(slope, distance); }, "slope"_a, "distance"_a);
}

}  // namespace

void bind_core(py::module_& m) {
  bind_band(m);
  bind_schedule(m);
  bind_dropout(m);
  bind_softmax(m);
  bind_score(m);
}

}  // namespace fae::python
