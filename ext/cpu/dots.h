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

// sums += a step of M rows times a block of each of P panels, four vectors of each at a time.
// Meanwhile what comes next is fetched: of one panel `run.lines` lines, of several as `run.soon`
// says.
template <int M, int P, class Block>
[[gnu::always_inline]] inline void multiply_step(const uint16_t* rows, const Block (&blocks)[P],
                                                 const TileRun& run, const char* soon,
                                                 RowSums<M, P>& sums) {
  // At most four lines per piece, without a branch: an address that is not due is asked for again.
  const int64_t lines = std::min<int64_t>(run.lines / kPieces, 4), pace = run.soon.pace / kSide;
  const int64_t second = lines > 1 ? 64 : 0, third = lines > 2 ? 128 : 0, last = (lines - 1) * 64;
#pragma GCC unroll 1
  for (int64_t piece = 0; piece < kPieces; ++piece) {
    if constexpr (P == 1) {
      _mm_prefetch(soon, _MM_HINT_T0);
      _mm_prefetch(soon + second, _MM_HINT_T0);
      _mm_prefetch(soon + third, _MM_HINT_T0);
      _mm_prefetch(soon + last, _MM_HINT_T0);
      soon += lines * 64;
    }
    Bytes w[P][4];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      blocks[p].take(2 * piece, w[p][0], w[p][1]);
      blocks[p].take(2 * piece + 1, w[p][2], w[p][3]);
    }
#pragma GCC unroll 2
    for (int64_t pair = 0; pair < 2; ++pair) {
      if constexpr (P > 1) {
        soon += pace;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          _mm_prefetch(soon + p * run.soon.apart, _MM_HINT_T0);
          _mm_prefetch(soon + p * run.soon.apart + 64, _MM_HINT_T0);
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const __m512bh x = fill_pairs(rows + i * kDepth + 4 * piece + 2 * pair);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          sums[p][0][i] = _mm512_dpbf16_ps(sums[p][0][i], x, (__m512bh)w[p][2 * pair]);
          sums[p][1][i] = _mm512_dpbf16_ps(sums[p][1][i], x, (__m512bh)w[p][2 * pair + 1]);
        }
      }
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
  const char* soon = run.soon.at;
  Fetching<PIECES> fetching(run, P == 1 ? kPieces : 1);
  for (int64_t step = 0; step < run.steps; ++step) {
    const bool in_registers = P == 1 && folded && is_regular(folded.block(step));
    const uint16_t* plain = in_registers       ? nullptr
                            : P == 1 && folded ? unfold_apart<TileOrder>(folded.block(step))
                                               : run.weights.at + step * kStepWeights;
    for (int piece = 0; piece < PIECES; ++piece, rows += M * kDepth) {
      fetching.template next<_MM_HINT_T0>();
      if (in_registers) {
        if constexpr (P == 1) {
          const FoldedBlock blocks[] = {FoldedBlock(folded.block(step))};
          multiply_step<M, P>(rows, blocks, run, soon, sums);
        }
      } else {
        PlainBlock<TileOrder> blocks[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
          blocks[p] = PlainBlock<TileOrder>(plain + p * run.weights.apart);
        multiply_step<M, P>(rows, blocks, run, soon, sums);
      }
      soon += P == 1 ? run.lines * 64 : run.soon.pace;
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
