// Low-rank attachments of a batch: rows are shrunk by A once per call, then expanded by B tile by
// tile beside the product they are added to.
#pragma once
#include "panel.h"
#include "scratch.h"

namespace blockllm {

// Dot products of R rows of x with J rows of A: out[r * out_stride + j].
template <int R, int J>
void shrink_tile(const float* x, const float* a, int64_t width, float scale, float* out,
                 int64_t out_stride) {
  Vec total[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) total[r][j] = zero();
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    Vec row[R];
    for (int r = 0; r < R; ++r) row[r] = load(x + r * width + k);
    for (int j = 0; j < J; ++j) {
      const Vec factor = load(a + j * width + k);
      for (int r = 0; r < R; ++r) total[r][j] = fma(row[r], factor, total[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) {
      float value = sum(total[r][j]);
      for (int64_t t = k; t < width; ++t) value += x[r * width + t] * a[j * width + t];
      out[r * out_stride + j] = scale * value;
    }
  }
}

template <int R>
void shrink_rows(const Segment& s, const float* x, int64_t width, float* out) {
  const auto scale = static_cast<float>(s.scale);
  int64_t j = 0;
  for (; j + 4 <= s.rank; j += 4)
    shrink_tile<R, 4>(x, s.a + j * width, width, scale, out + j, s.rank);
  for (; j < s.rank; ++j) shrink_tile<R, 1>(x, s.a + j * width, width, scale, out + j, s.rank);
}

// shrunk[r][j] = scale * <x[r], A[j]> for rows [first, last) of the segment.
inline void shrink(const Segment& s, const float* x, int64_t width, int64_t first, int64_t last,
                   float* shrunk) {
  float* out = shrunk + s.offset;
  int64_t r = first;
  for (; r + 2 <= last; r += 2)
    shrink_rows<2>(s, x + r * width, width, out + (r - s.first) * s.rank);
  if (r < last) shrink_rows<1>(s, x + r * width, width, out + (r - s.first) * s.rank);
}

// An 8 x 8 block of B turned round: out[j * kPanel + c] = b[c * rank + j].
inline void transpose_8x8(const float* b, int64_t rank, float* out) {
  __m256 quads[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // rows i and i + 4 side by side, first four then last four ranks
    const float* from = b + (i % 4) * rank + (i / 4) * 4;
    quads[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                    _mm_loadu_ps(from + 4 * rank), 1);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m256* q = quads + 4 * h;
    const __m256 t0 = _mm256_unpacklo_ps(q[0], q[1]), t1 = _mm256_unpackhi_ps(q[0], q[1]);
    const __m256 t2 = _mm256_unpacklo_ps(q[2], q[3]), t3 = _mm256_unpackhi_ps(q[2], q[3]);
    float* to = out + 4 * h * kPanel;
    _mm256_storeu_ps(to, _mm256_shuffle_ps(t0, t2, 0x44));
    _mm256_storeu_ps(to + kPanel, _mm256_shuffle_ps(t0, t2, 0xee));
    _mm256_storeu_ps(to + 2 * kPanel, _mm256_shuffle_ps(t1, t3, 0x44));
    _mm256_storeu_ps(to + 3 * kPanel, _mm256_shuffle_ps(t1, t3, 0xee));
  }
}

// turned[j][c] = B[c][j] for `outputs` <= kPanel rows of B; further columns are zero.
inline void transpose(const float* b, int64_t rank, int64_t outputs, float* turned) {
  const int64_t whole = rank / 8 * 8;
  int64_t c = 0;
  for (; c + 8 <= outputs; c += 8) {
    for (int64_t j = 0; j < whole; j += 8)
      transpose_8x8(b + c * rank + j, rank, turned + j * kPanel + c);
    for (int64_t j = whole; j < rank; ++j)
      for (int64_t i = c; i < c + 8; ++i) turned[j * kPanel + i] = b[i * rank + j];
  }
  for (; c < kPanel; ++c)
    for (int64_t j = 0; j < rank; ++j)
      turned[j * kPanel + c] = c < outputs ? b[c * rank + j] : 0.0f;
}

// What `expand` will read of a segment's B for a panel: short runs far apart, worth fetching ahead.
struct Piece {
  const char* at;
  int64_t bytes;
};

inline Piece piece_of(const Segment& s, int64_t panel, int64_t out) {
  const int64_t column = panel * kPanel, columns = out - column < kPanel ? out - column : kPanel;
  const auto* at = reinterpret_cast<const char*>(s.b + column * s.rank);
  return {at, columns * s.rank * static_cast<int64_t>(sizeof(float))};
}

template <int R>
void expand_tile(const float* shrunk, const float* turned, int64_t rank, float* sums) {
  Vec low[R], high[R];
  for (int r = 0; r < R; ++r) low[r] = high[r] = zero();
  for (int64_t j = 0; j < rank; ++j) {
    const Vec b_low = load(turned + j * kPanel), b_high = load(turned + j * kPanel + kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec x = fill(shrunk[r * rank + j]);
      low[r] = fma(x, b_low, low[r]);
      high[r] = fma(x, b_high, high[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    store(sums + r * kPanel, add(load(sums + r * kPanel), low[r]));
    store(sums + r * kPanel + kLanes, add(load(sums + r * kPanel + kLanes), high[r]));
  }
}

// Adds the patch to a panel's sums [rows][kPanel] of batch rows [first, last).
inline void expand(const Patch& patch, const float* shrunk, int64_t panel, int64_t out,
                   int64_t first, int64_t last, float* sums) {
  for (int64_t i = 0; i < patch.count; ++i) {
    const Segment& s = patch.segments[i];
    const int64_t from = s.first > first ? s.first : first;
    const int64_t to = s.last < last ? s.last : last;
    if (from >= to) continue;
    float* turned = scratch<kTurned>(s.rank * kPanel);
    const int64_t column = panel * kPanel;
    transpose(s.b + column * s.rank, s.rank, out - column < kPanel ? out - column : kPanel, turned);
    const float* rows = shrunk + s.offset - s.first * s.rank;
    int64_t r = from;
    for (; r + 4 <= to; r += 4)
      expand_tile<4>(rows + r * s.rank, turned, s.rank, sums + (r - first) * kPanel);
    for (; r < to; ++r)
      expand_tile<1>(rows + r * s.rank, turned, s.rank, sums + (r - first) * kPanel);
  }
}

}  // namespace blockllm
