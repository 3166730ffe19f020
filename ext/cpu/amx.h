// Products of bfloat16 weights by AMX, as exact as those of float32 multiply-adds.
//
// AMX multiplies bfloat16 by bfloat16 and sums in float32. A float32 activation has 24 significant
// bits and is cut, without loss, into three pieces of 8: high + middle + low; each piece times a
// bfloat16 weight is exact in float32. A sum takes, for 32 inputs at a time, the three pieces one
// after the other, in the same order whatever the number of rows: so a row's result does not depend
// on the other rows of the batch.
//
// Weights: panels of kPanel outputs, each [inputs / 32][2 tiles][16 pairs of inputs][16 outputs][2],
// padded with zeros. A packed group of M rows: [inputs / 32][3 pieces][M][32].
#pragma once
#include <algorithm>

#include "chunk.h"
#include "tile.h"

namespace blockllm {

constexpr int64_t kDepth = 32;                   // inputs of a tile
constexpr int64_t kTileWeights = 16 * kDepth;    // 16 outputs
constexpr int64_t kStepWeights = 2 * kTileWeights;  // kDepth inputs of a panel
constexpr int64_t kStepLines = kStepWeights * 2 / 64 + 1;  // of 64 bytes, in three equal parts
constexpr int64_t kPieces = 3;
constexpr int64_t kHeight = 16;  // rows of a tile

inline int64_t steps_of(int64_t in) { return ceil_div(in, kDepth); }

// Elements of a group's packed rows, or of all groups'.
inline int64_t cut_size(int64_t rows, int64_t width) {
  return rows * kPieces * steps_of(width) * kDepth;
}

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
      shapes.bytes[i] = rows[i] > 0 ? 64 : 0;
      shapes.rows[i] = static_cast<uint8_t>(rows[i]);
    }
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The 16 floats at `x`, `left` of which count, as three vectors of bfloat16.
inline void cut(const float* x, int64_t left, uint16_t* high, int64_t piece_stride) {
  const __mmask16 some = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
  __m512 rest = _mm512_maskz_loadu_ps(some, x);
  for (int piece = 0; piece < kPieces; ++piece) {
    const __m512i bits = _mm512_castps_si512(rest);
    const __m512i top = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + piece * piece_stride),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(top));
  }
}

// Packs a group of `count` rows of `width`.
inline void cut_group(const float* rows, int64_t width, int64_t count, uint16_t* packed) {
  for (int64_t k = 0; k < width; k += kDepth) {
    uint16_t* step = packed + k * kPieces * count;
    for (int64_t r = 0; r < count; ++r) {
      const float* x = rows + r * width + k;
      uint16_t* to = step + r * kDepth;
      cut(x, width - k, to, count * kDepth);
      cut(x + 16, std::max<int64_t>(0, width - k - 16), to + 16, count * kDepth);
    }
  }
}

// sums[row][kPanel] = rows times one panel, for one group of rows or (PAIR) two whose sums lie
// behind each other. The tile registers are shaped for them.
template <bool PAIR>
void multiply_groups(const uint16_t* first, int64_t first_rows, const uint16_t* second,
                     int64_t second_rows, const uint16_t* weights, int64_t steps, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (PAIR) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const char* ahead = reinterpret_cast<const char*>(weights) + kAhead;
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kTileWeights, 64);
    weights += kStepWeights;
    for (int64_t piece = 0; piece < kPieces; ++piece) {
      for (int64_t line = 0; line < kStepLines / kPieces; ++line, ahead += 64)
        _mm_prefetch(ahead, _MM_HINT_T1);
      _tile_loadd(4, first, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      first += first_rows * kDepth;
      if constexpr (PAIR) {
        _tile_loadd(5, second, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        second += second_rows * kDepth;
      }
    }
  }
  constexpr int64_t kStride = kPanel * sizeof(float);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  if constexpr (PAIR) {
    _tile_stored(2, sums + first_rows * kPanel, kStride);
    _tile_stored(3, sums + first_rows * kPanel + 16, kStride);
  }
}

// sums[panel][row][kPanel] = rows times some panels of a matrix; `packed` has the rows' groups one
// behind the other.
inline void multiply_tiles(const Matrix& m, const Rows& panels, const uint16_t* packed,
                           int64_t rows, float* sums) {
  const int64_t groups = ceil_div(rows, kHeight), steps = steps_of(m.in);
  const auto* weights = static_cast<const uint16_t*>(m.data) + panels.first * steps * kStepWeights;
  for (int64_t g = 0; g < groups; g += 2) {
    const Rows one = part(rows, groups, g);
    const int64_t other = g + 1 < groups ? part(rows, groups, g + 1).count : 0;
    const uint16_t* first = packed + cut_size(one.first, m.in);
    const uint16_t* second = first + cut_size(one.count, m.in);
    const TileRegisters registers(one.count, other);
    for (int64_t p = 0; p < panels.count; ++p) {
      const uint16_t* from = weights + p * steps * kStepWeights;
      float* to = sums + (p * rows + one.first) * kPanel;
      other > 0 ? multiply_groups<true>(first, one.count, second, other, from, steps, to)
                : multiply_groups<false>(first, one.count, second, other, from, steps, to);
    }
  }
}

#else

constexpr bool kHasTiles = false;

void cut_group(const float* rows, int64_t width, int64_t count, uint16_t* packed);
void multiply_tiles(const Matrix& m, const Rows& panels, const uint16_t* packed, int64_t rows,
                    float* sums);

#endif

}  // namespace blockllm
