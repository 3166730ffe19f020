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

// Sums of M rows, P panels.
template <int M, int P>
using RowSums = Vec[P][2][M];

// sums += two inputs of M rows times the weights of them.
template <int M, int P>
[[gnu::always_inline]] inline void multiply_pair(const uint16_t* rows, const __m512bh (&w)[P][2],
                                                 RowSums<M, P>& sums) {
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    const __m512bh x = fill_pairs(rows + i * kDepth);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      sums[p][0][i] = _mm512_dpbf16_ps(sums[p][0][i], x, w[p][0]);
      sums[p][1][i] = _mm512_dpbf16_ps(sums[p][1][i], x, w[p][1]);
    }
  }
}

// The same of a step, whose weights each panel has `apart` elements behind those of the one before.
// Where there are several, `soon` is fetched.
template <int M, int P>
[[gnu::always_inline]] inline void multiply_step(const uint16_t* rows, const uint16_t* weights,
                                                 int64_t apart, Stream soon, RowSums<M, P>& sums) {
  soon.pace /= kSide;  // of pairs
#pragma GCC unroll 4
  for (int64_t pair = 0; pair < kSide; ++pair) {
    __m512bh w[P][2];
    if constexpr (P > 1) soon.at += soon.pace;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const uint16_t* at = weights + p * apart + pair * kDepth;
      if constexpr (P > 1) {
        _mm_prefetch(soon.at + p * soon.apart, kOnce);
        _mm_prefetch(soon.at + p * soon.apart + 64, kOnce);
      }
      w[p][0] = pairs(at);
      w[p][1] = pairs(at + kTileWeights);
    }
    multiply_pair<M, P>(rows + 2 * pair, w, sums);
  }
}

// The same of one panel, whose weights are a block, folded. Before each piece of it as many lines
// are fetched: up to four, without a loop, so that one which is not due is asked for again.
template <int M>
[[gnu::always_inline]] inline void multiply_block(const uint16_t* rows, const FoldedBlock& block,
                                                  const char* soon, int64_t lines,
                                                  RowSums<M, 1>& sums) {
  const int64_t second = lines > 1 ? 64 : 0, third = lines > 2 ? 128 : 0, last = (lines - 1) * 64;
#pragma GCC unroll 1
  for (int64_t piece = 0; piece < kPieces; ++piece, soon += lines * 64) {
    if (lines > 0) {
      _mm_prefetch(soon, kOnce);
      _mm_prefetch(soon + second, kOnce);
      _mm_prefetch(soon + third, kOnce);
      _mm_prefetch(soon + last, kOnce);
    }
    Bytes taken[4];
    block.take(2 * piece, taken[0], taken[1]);
    block.take(2 * piece + 1, taken[2], taken[3]);
#pragma GCC unroll 2
    for (int64_t pair = 0; pair < 2; ++pair) {
      const __m512bh w[1][2] = {{(__m512bh)taken[2 * pair], (__m512bh)taken[2 * pair + 1]}};
      multiply_pair<M, 1>(rows + 4 * piece + 2 * pair, w, sums);
    }
  }
}

// One group of M rows, P panels; one panel may lie folded.
template <int PIECES, int M, int P>
void multiply_rows(const TileRun& run) {
  RowSums<M, P> sums;
#pragma GCC unroll 8
  for (int at = 0; at < 2 * P; ++at) {
    const float* from = run.sums + at / 2 * run.sums_stride + at % 2 * kLanes;
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
      sums[at / 2][at % 2][i] = run.begins ? zero() : load(from + i * kPanel);
  }
  const uint16_t* rows = run.rows;
  const Folded& folded = run.weights.folded;
  const int64_t lines = folded ? std::min<int64_t>(run.lines / kPieces, 4) : 0;
  Stream soon = run.soon;
  Fetching<PIECES> fetching(run, lines * kPieces);
  for (int64_t step = 0; step < run.steps; ++step) {
    const bool in_registers = P == 1 && folded && is_regular(folded.block(step));
    const uint16_t* plain = in_registers       ? nullptr
                            : P == 1 && folded ? unfold_apart<TileOrder>(folded.block(step))
                                               : run.weights.at + step * kStepWeights;
    for (int piece = 0; piece < PIECES; ++piece, rows += M * kDepth) {
      fetching.template next<kOnce>();
      if (in_registers) {
        if constexpr (P == 1)
          multiply_block<M>(rows, FoldedBlock(folded.block(step)), soon.at, lines, sums);
      } else {
        multiply_step<M, P>(rows, plain, run.weights.apart, soon, sums);
      }
      soon.at += P == 1 ? run.lines * 64 : run.soon.pace;
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
