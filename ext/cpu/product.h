// Products of rows in pieces (pieces.h) and matrices in tiles (amx.h).
//
// A sum takes, for 32 inputs at a time, a row's pieces one after the other, in the same order
// whatever the number of rows, and leaves the registers exactly: so a row's result does not depend
// on the other rows of the batch.
#pragma once
#include "pieces.h"
#include "tile.h"

namespace blockllm {

// Rows in pieces. Their sums are [panel][row][kPanel], with room for each group's height.
struct Cut {
  Groups groups;
  const uint16_t* pieces;
};

#if defined(__AMX_BF16__)

// So many steps of a panel stay in the first-level cache while many groups of rows pass. Of rows in
// several pieces, more is multiplied per load, and whole panels are.
constexpr int64_t kRunSteps = 10;

// What one or two groups of rows do with a run of a panel.
struct TileRun {
  const uint16_t* first;
  const uint16_t* second;
  const uint16_t* weights;
  int64_t steps, height;
  float* sums;  // of the first group, those of the second behind them
  bool begins;  // sums begin at zero
  const char* soon;  // memory to fetch meanwhile, `lines` of 64 bytes per piece
  int64_t lines;
};

template <bool PAIR>
void begin_sums(const TileRun& run, int64_t second) {
  constexpr int64_t kStride = kPanel * sizeof(float);
  if (run.begins) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (PAIR) {
      _tile_zero(2);
      _tile_zero(3);
    }
    return;
  }
  _tile_loadd(0, run.sums, kStride);
  _tile_loadd(1, run.sums + 16, kStride);
  if constexpr (PAIR) {
    _tile_loadd(2, run.sums + second, kStride);
    _tile_loadd(3, run.sums + second + 16, kStride);
  }
}

// sums (+)= the groups' pieces times the run.
template <int PIECES, bool PAIR>
void multiply_run(const TileRun& run) {
  const int64_t second_sums = run.height * kPanel, tile = run.height * kDepth;
  begin_sums<PAIR>(run, second_sums);
  const uint16_t *first = run.first, *second = run.second, *weights = run.weights;
  const char* soon = run.soon;
  for (int64_t step = 0; step < run.steps; ++step) {
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kTileWeights, 64);
    weights += kStepWeights;
#pragma GCC unroll 3
    for (int piece = 0; piece < PIECES; ++piece) {
      for (int64_t line = 0; line < run.lines; ++line, soon += 64) _mm_prefetch(soon, _MM_HINT_T1);
      _tile_loadd(4, first, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      first += tile;
      if constexpr (PAIR) {
        _tile_loadd(5, second, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        second += tile;
      }
    }
  }
  constexpr int64_t kStride = kPanel * sizeof(float);
  _tile_stored(0, run.sums, kStride);
  _tile_stored(1, run.sums + 16, kStride);
  if constexpr (PAIR) {
    _tile_stored(2, run.sums + second_sums, kStride);
    _tile_stored(3, run.sums + second_sums + 16, kStride);
  }
}

// sums[row][kPanel] = rows times one panel.
template <int PIECES>
void multiply_tile_panel(const Cut& rows, const uint16_t* panel, int64_t steps, float* sums) {
  const int64_t groups = rows.groups.count, height = rows.groups.height;
  const int64_t apart = height * PIECES * steps * kDepth;  // from group to group
  const int64_t pairs = ceil_div(groups, 2);
  const int64_t runs = pairs == 1 || PIECES > 1 ? 1 : ceil_div(steps, kRunSteps);
  const int64_t bytes = kStepWeights * sizeof(uint16_t);
  const int64_t lines = ceil_div(bytes / 64, pairs * PIECES);
  for (int64_t i = 0; i < runs; ++i) {
    const Rows run = part(steps, runs, i);
    const uint16_t* weights = panel + run.first * kStepWeights;
    const char* soon =
        reinterpret_cast<const char*>(weights) + (runs == 1 ? kAhead : run.count * bytes);
    for (int64_t g = 0; g < groups; g += 2, soon += lines * PIECES * 64 * run.count) {
      const uint16_t* first = rows.pieces + g * apart + run.first * PIECES * height * kDepth;
      float* to = sums + g * height * kPanel;
      const TileRun call{first, first + apart, weights, run.count, height, to, i == 0, soon, lines};
      g + 1 < groups ? multiply_run<PIECES, true>(call) : multiply_run<PIECES, false>(call);
    }
  }
}

// sums[panel][row][kPanel] = rows times some panels of a matrix.
inline void multiply_tiles(const Matrix& m, const Rows& panels, const Cut& rows, float* sums) {
  const int64_t steps = steps_of(m.in);
  const auto* weights = static_cast<const uint16_t*>(m.data) + panels.first * steps * kStepWeights;
  const TileRegisters registers(rows.groups.height, rows.groups.height);
  for (int64_t p = 0; p < panels.count; ++p) {
    const uint16_t* panel = weights + p * steps * kStepWeights;
    float* to = sums + p * rows.groups.room() * kPanel;
    rows.groups.pieces == 1 ? multiply_tile_panel<1>(rows, panel, steps, to)
                            : multiply_tile_panel<kExactPieces>(rows, panel, steps, to);
  }
}

#else

inline void multiply_tiles(const Matrix&, const Rows&, const Cut&, float*) {}

#endif

}  // namespace blockllm
