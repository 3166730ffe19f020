// Products of rows in pieces (pieces.h) and matrices in tiles (tiles.h).
//
// A sum takes, for 32 inputs at a time, a row's pieces one after the other, in the same order
// whatever the number of rows, and leaves the registers exactly: so a row's result does not depend
// on the other rows of the batch.
#pragma once
#include "amx.h"
#include "dots.h"
#include "pieces.h"
#include "tile.h"

namespace blockllm {

// Rows in pieces. Their sums are [panel][row][kPanel], with room for each group's height.
struct Cut {
  Groups groups;
  const uint16_t* pieces;
};

#if defined(__AVX512BF16__)

// So many steps of a panel stay in the first-level cache while many groups of rows pass. Of rows in
// several pieces, more is multiplied per load, and whole panels are.
constexpr int64_t kRunSteps = 10;

// sums[panel][row][kPanel] = rows times some panels, of which there are several only for one group.
// It takes several turns, in each of which the lines of later(turn, turns) are fetched.
template <int PIECES, class Later>
void multiply_tile_panels(const Cut& rows, const uint16_t* weights, int64_t panels, int64_t steps,
                          float* sums, const Later& later) {
  const int64_t groups = rows.groups.count, height = rows.groups.height;
  const int64_t apart = height * PIECES * steps * kDepth;  // from group to group
  const int64_t turns = ceil_div(groups, kGroupsAtOnce);
  const int64_t runs = turns == 1 || PIECES > 1 ? 1 : ceil_div(steps, kRunSteps);
  const int64_t bytes = kStepWeights * sizeof(uint16_t);
  const int64_t lines = panels > 1 ? 0 : ceil_div(bytes / 64, turns * PIECES);
  for (int64_t i = 0; i < runs; ++i) {
    const Rows run = part(steps, runs, i);
    const uint16_t* from = weights + run.first * kStepWeights;
    const char* soon =
        reinterpret_cast<const char*>(from) + (runs == 1 ? kAhead : run.count * bytes);
    for (int64_t g = 0; g < groups; g += kGroupsAtOnce, soon += lines * PIECES * 64 * run.count) {
      const uint16_t* first = rows.pieces + g * apart + run.first * PIECES * height * kDepth;
      multiply_run<PIECES>({first, apart, height, from, run.count, panels, steps * kStepWeights,
                            sums + g * height * kPanel, rows.groups.room() * kPanel, i == 0, soon,
                            lines, later(i * turns + g / kGroupsAtOnce, runs * turns)},
                           std::min(kGroupsAtOnce, groups - g));
    }
  }
}

// sums[panel][row][kPanel] = rows times some panels of a matrix. While a few of these are
// multiplied, the lines of later(panels, turn, turns) are fetched in each turn.
template <class Later>
void multiply_tiles(const Matrix& m, const Rows& panels, const Cut& rows, float* sums,
                    const Later& later) {
  const int64_t steps = steps_of(m.in), height = rows.groups.height;
  const auto* weights = static_cast<const uint16_t*>(m.data) + panels.first * steps * kStepWeights;
  const TileRegisters registers(height);
  for (int64_t at = 0; at < panels.count;) {
    const int64_t left = panels.count - at;
    const int64_t some = kGroupsAtOnce == 1 ? tile_panels(rows.groups.room(), left) : 1;
    const uint16_t* from = weights + at * steps * kStepWeights;
    float* to = sums + at * rows.groups.room() * kPanel;
    const auto own = [&](int64_t turn, int64_t turns) {
      return later(Rows{panels.first + at, some}, turn, turns);
    };
    rows.groups.pieces == 1 ? multiply_tile_panels<1>(rows, from, some, steps, to, own)
                            : multiply_tile_panels<kExactPieces>(rows, from, some, steps, to, own);
    at += some;
  }
}

#else

template <class Later>
void multiply_tiles(const Matrix&, const Rows&, const Cut&, float*, const Later&) {}

#endif

}  // namespace blockllm
