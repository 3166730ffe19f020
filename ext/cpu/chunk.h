// How the rows of a call are divided: tasks take chunks, register tiles take groups of at most
// kTileRows rows. A packed group of M rows is [width][M].
#pragma once
#include <cstdint>

#include "vec.h"

namespace blockllm {

struct Rows {
  int64_t first, count;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The i-th of `parts` nearly equal parts of `count` rows.
inline Rows part(int64_t count, int64_t parts, int64_t i) {
  const int64_t first = count * i / parts;
  return {first, count * (i + 1) / parts - first};
}

// Which of these parts has a row.
inline int64_t part_with(int64_t count, int64_t parts, int64_t row) {
  return ((row + 1) * parts - 1) / count;
}

inline int64_t groups_of(int64_t count) { return ceil_div(count, kTileRows); }

// packed[k][i] = rows[i][k]
inline void pack_group(const float* rows, int64_t width, int64_t count, float* packed) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* row = rows + i * width;
    int64_t k = 0;
    for (; k + 4 <= width; k += 4) {
      __m128 a = _mm_loadu_ps(row + k), b = _mm_loadu_ps(row + width + k);
      __m128 c = _mm_loadu_ps(row + 2 * width + k), d = _mm_loadu_ps(row + 3 * width + k);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* to = packed + k * count + i;
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + count, b);
      _mm_storeu_ps(to + 2 * count, c);
      _mm_storeu_ps(to + 3 * count, d);
    }
    for (; k < width; ++k)
      for (int64_t r = 0; r < 4; ++r) packed[k * count + i + r] = row[r * width + k];
  }
  for (; i < count; ++i) {
    const float* row = rows + i * width;
    for (int64_t k = 0; k < width; ++k) packed[k * count + i] = row[k];
  }
}

}  // namespace blockllm
