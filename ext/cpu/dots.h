// Products of tiles by AVX-512's dot products of pairs of bfloat16s: twice what multiply-adds of
// float32 do, so worth it where rows are one piece.
#pragma once
#include <cstring>

#include "tile.h"
#include "tiles.h"

namespace blockllm {

#if defined(__AVX512BF16__)

inline __m512bh pairs(const uint16_t* at) { return (__m512bh)_mm512_loadu_si512(at); }

// A pair of a row, in every lane.
inline __m512bh fill_pairs(const void* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

#endif

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

// The same name as AMX's, which has to be told shapes.
struct TileRegisters {
  explicit TileRegisters(int64_t) {}
  ~TileRegisters() {}
};

// One group of M rows, P panels.
template <int PIECES, int M, int P>
void multiply_rows(const TileRun& run) {
  Vec sums[P][2][M];
#pragma GCC unroll 8
  for (int at = 0; at < 2 * P; ++at) {
    const float* from = run.sums + at / 2 * run.sums_stride + at % 2 * kLanes;
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
      sums[at / 2][at % 2][i] = run.begins ? zero() : load(from + i * kPanel);
  }
  const uint16_t *row = run.rows, *weights = run.weights;
  const char* soon = run.soon.at;
  const int64_t pace = run.soon.pace / (kDepth / 2);  // per pair
  Fetching<PIECES> fetching(run);
  for (int64_t step = 0; step < run.steps; ++step, weights += kStepWeights) {
    for (int piece = 0; piece < PIECES; ++piece, row += M * kDepth) {
      fetching.template next<_MM_HINT_T0>();
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < kDepth; pair += 2) {
        __m512bh w[P][2];
        if constexpr (P > 1) soon += pace;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const uint16_t* at = weights + p * run.panel_stride + pair * 16;
          if constexpr (P > 1) {
            _mm_prefetch(soon + p * run.soon.apart, _MM_HINT_T0);
            _mm_prefetch(soon + p * run.soon.apart + 64, _MM_HINT_T0);
          }
          w[p][0] = pairs(at);
          w[p][1] = pairs(at + kTileWeights);
        }
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) {
          const __m512bh x = fill_pairs(row + i * kDepth + pair);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            sums[p][0][i] = _mm512_dpbf16_ps(sums[p][0][i], x, w[p][0]);
            sums[p][1][i] = _mm512_dpbf16_ps(sums[p][1][i], x, w[p][1]);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int at = 0; at < 2 * P; ++at) {
    float* to = run.sums + at / 2 * run.sums_stride + at % 2 * kLanes;
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) store(to + i * kPanel, sums[at / 2][at % 2][i]);
  }
}

template <int PIECES, int M>
void multiply_rows_of(const TileRun& run) {
  if constexpr (M == 1) {
    if (run.panels == 4) return multiply_rows<PIECES, M, 4>(run);
    if (run.panels == 3) return multiply_rows<PIECES, M, 3>(run);
  }
  if constexpr (M <= 2) {
    if (run.panels == 2) return multiply_rows<PIECES, M, 2>(run);
  }
  multiply_rows<PIECES, M, 1>(run);
}

// One group; as many panels as `tile_panels` says.
template <int PIECES, int M = 1>
void multiply_run(const TileRun& run, int64_t groups) {
  if constexpr (M < kHeight) {
    if (run.height > M) return multiply_run<PIECES, M + 1>(run, groups);
  }
  multiply_rows_of<PIECES, M>(run);
}

template <int S>
void multiply_squares(const Squares& c) {
  constexpr int kRows = S == 2 ? 8 : 16;  // 16 sums
  for (int64_t first = 0; first < 2 * kSide; first += kRows) {
    const char* rows = reinterpret_cast<const char*>(c.rows[first / kSide]);
    rows += first % kSide * c.stride;
    Vec sums[kRows][S];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) sums[i][s] = zero();
    for (int64_t step = 0; step < c.steps; ++step) {
      const char* at = rows + step * c.apart * 2;
#pragma GCC unroll 2
      for (int64_t pair = 0; pair < kSide; ++pair) {
        __m512bh w[S];
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s)
          w[s] = pairs(c.stripes[s] + step * kTileWeights + pair * kDepth);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const __m512bh x = fill_pairs(at + i * c.stride + pair * 4);
#pragma GCC unroll 2
          for (int s = 0; s < S; ++s) sums[i][s] = _mm512_dpbf16_ps(sums[i][s], x, w[s]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) store(c.out[s] + (first + i) * kSide, sums[i][s]);
  }
}

#endif

}  // namespace blockllm
