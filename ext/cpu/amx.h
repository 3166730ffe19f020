// How weights lie in tiles for AMX, which multiplies bfloat16 by bfloat16 and sums in float32; and
// the tile registers.
//
// Panels of kPanel outputs, each [inputs / 32][2 tiles][16 pairs of inputs][16 outputs][2], padded
// with zeros: a step of kDepth inputs of a panel is 2 KiB that one product after the other reads in
// order.
#pragma once
#include "chunk.h"
#include "panel.h"

namespace blockllm {

constexpr int64_t kDepth = 32;                      // inputs of a tile
constexpr int64_t kTileWeights = 16 * kDepth;       // 16 outputs
constexpr int64_t kStepWeights = 2 * kTileWeights;  // kDepth inputs of a panel
constexpr int64_t kHeight = 16;                     // rows of a tile, at most

inline int64_t steps_of(int64_t in) { return ceil_div(in, kDepth); }

// Where the weight of output c of a panel and input k lies within the panel.
inline int64_t tile_place(int64_t c, int64_t k) {
  return k / kDepth * kStepWeights + c / 16 * kTileWeights + k % kDepth / 2 * 32 + c % 16 * 2 +
         k % 2;
}

#if defined(__AMX_BF16__)

constexpr bool kHasTiles = true;

// The shapes of the tile registers, as the processor reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// While this lives, registers 0 and 1 hold sums of the first group of rows, 2 and 3 of the second,
// 4 and 5 a piece of each, 6 and 7 weights.
class TileRegisters {
 public:
  TileRegisters(int64_t first, int64_t second) {
    TileShapes shapes;
    const int64_t rows[8] = {first, first, second, second, first, second, kHeight, kHeight};
    for (int i = 0; i < 8; ++i) {
      shapes.bytes[i] = 64;
      shapes.rows[i] = static_cast<uint8_t>(rows[i]);
    }
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

#else

constexpr bool kHasTiles = false;

#endif

}  // namespace blockllm
