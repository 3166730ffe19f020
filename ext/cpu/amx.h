// Products of tiles by AMX.
#pragma once
#include <atomic>

#include "tiles.h"

namespace blockllm {

#if defined(__AMX_BF16__)

// The shapes of the tile registers, as the processor reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// While this lives, registers 0 and 1 hold sums of the first of two groups of rows, 2 and 3 of the
// second, 4 and 5 a piece of each, 6 and 7 weights.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t height) {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.bytes[i] = 64;
      shapes.rows[i] = static_cast<uint8_t>(i < 6 ? height : 16);
    }
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
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

// One group, or a pair of them.
template <int PIECES, bool PAIR>
void multiply_groups_of(const TileRun& run) {
  std::atomic_signal_fence(std::memory_order_seq_cst);  // what was stored is there to be loaded
  const int64_t second_sums = run.height * kPanel, tile = run.height * kDepth;
  begin_sums<PAIR>(run, second_sums);
  const uint16_t *first = run.rows, *second = run.rows + run.apart, *weights = run.weights.at;
  Fetching<PIECES> fetching(run);
  for (int64_t step = 0; step < run.steps; ++step) {
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kTileWeights, 64);
    weights += kStepWeights;
#pragma GCC unroll 3
    for (int piece = 0; piece < PIECES; ++piece) {
      fetching.template next<_MM_HINT_T1>();
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

// One or two groups, one panel.
template <int PIECES>
void multiply_run(const TileRun& run, int64_t groups) {
  groups == 2 ? multiply_groups_of<PIECES, true>(run) : multiply_groups_of<PIECES, false>(run);
}

template <int S>
void multiply_squares(const Squares& c) {
  std::atomic_signal_fence(std::memory_order_seq_cst);  // what was stored is there to be loaded
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (S == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < c.steps; ++step) {
    _tile_loadd(4, c.rows[0] + step * c.apart, c.stride);
    _tile_loadd(6, c.stripes[0] + step * kTileWeights, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, c.rows[1] + step * c.apart, c.stride);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (S == 2) {
      _tile_loadd(7, c.stripes[1] + step * kTileWeights, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c.out[0], 64);
  _tile_stored(1, c.out[0] + kSquare, 64);
  if constexpr (S == 2) {
    _tile_stored(2, c.out[1], 64);
    _tile_stored(3, c.out[1] + kSquare, 64);
  }
}

#endif

}  // namespace blockllm
