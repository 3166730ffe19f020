// Low-rank attachments of a batch: rows are shrunk by A once per call, then expanded by B tile by
// tile upon the sums of the product they are added to.
//
// A keeps its rows, B lies in panels. Both are read in their stored precision. The shrunk rows of a
// segment lie by groups (see chunk.h) of its rows within each chunk: a group that begins at row r
// lies at offset + (r - first) * rank, as [rank][rows of the group].
#pragma once
#include <algorithm>

#include "chunk.h"
#include "tile.h"

namespace blockllm {

// Columns of a tile of up to four rows: as many sums as registers hold.
constexpr int kShrinkColumns = kLanes == 16 ? 4 : 2;
constexpr int kShrinkRows = 4;

// Calls body(group) for each group of the segment's rows within a chunk.
template <class Body>
void for_groups(const Segment& s, const Rows& chunk, Body&& body) {
  const int64_t first = std::max(s.first, chunk.first);
  const int64_t count = std::min(s.last, chunk.first + chunk.count) - first;
  if (count <= 0) return;
  const int64_t groups = groups_of(count);
  for (int64_t g = 0; g < groups; ++g) {
    const Rows group = part(count, groups, g);
    body(Rows{first + group.first, group.count});
  }
}

// Dot products of R rows of x with J rows of A: out[j * stride + r].
template <class T, int R, int J>
void shrink_tile(const float* x, const typename T::Element* a, int64_t width, float scale,
                 float* out, int64_t stride) {
  constexpr int kSums = (R * J + 3) / 4 * 4;
  Vec total[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) total[i] = zero();
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    Vec row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = load(x + r * width + k);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const auto* from = a + j * width + k;
      _mm_prefetch(reinterpret_cast<const char*>(from + J * width), _MM_HINT_T0);
      const Vec factor = T::row(from);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[j * R + r] = fma(row[r], factor, total[j * R + r]);
    }
  }
  float values[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += 4)
    _mm_storeu_ps(values + i, sums(total[i], total[i + 1], total[i + 2], total[i + 3]));
  for (int j = 0; j < J; ++j) {
    for (int r = 0; r < R; ++r) {
      float value = values[j * R + r];
      for (int64_t t = k; t < width; ++t) value += x[r * width + t] * T::value(a[j * width + t]);
      out[j * stride + r] = scale * value;
    }
  }
}

template <class T, int R>
void shrink_rows(const float* x, const typename T::Element* a, int64_t width, int64_t columns,
                 float scale, float* out, int64_t stride) {
  int64_t j = 0;
  for (; j + kShrinkColumns <= columns; j += kShrinkColumns)
    shrink_tile<T, R, kShrinkColumns>(x, a + j * width, width, scale, out + j * stride, stride);
  for (; j < columns; ++j)
    shrink_tile<T, R, 1>(x, a + j * width, width, scale, out + j * stride, stride);
}

// Ranks [first, first + count) of one group of rows: shrunk[j][i] = scale * <x[i], A[j]>.
template <class T>
void shrink(const Segment& s, const Rows& group, const Rows& ranks, const float* rows,
            int64_t width, float* shrunk) {
  const auto* a = static_cast<const typename T::Element*>(s.a) + ranks.first * width;
  const auto scale = static_cast<float>(s.scale);
  float* out = shrunk + s.offset + (group.first - s.first) * s.rank + ranks.first * group.count;
  for (int64_t i = 0; i < group.count; i += kShrinkRows) {
    const float* x = rows + (group.first + i) * width;
    const auto some = [&](auto count) {
      shrink_rows<T, decltype(count)::value>(x, a, width, ranks.count, scale, out + i, group.count);
    };
    switch (std::min<int64_t>(kShrinkRows, group.count - i)) {
      case 1:
        some(std::integral_constant<int, 1>());
        break;
      case 2:
        some(std::integral_constant<int, 2>());
        break;
      case 3:
        some(std::integral_constant<int, 3>());
        break;
      default:
        some(std::integral_constant<int, kShrinkRows>());
    }
  }
}

// What `expand` will read of a segment's B for some panels.
inline Stream piece_of(const Segment& s, const Rows& panels, int64_t steps) {
  const int64_t element = s.b_storage == Storage::kF32 ? 4 : 2, stride = s.rank * kPanel * element;
  return {static_cast<const char*>(s.b) + panels.first * stride,
          ceil_div(panels.count * stride, steps)};
}

// Adds a segment to the sums [panel][row][kPanel] of some panels, `apart` floats from each other,
// for the rows of one chunk.
template <class T>
void expand(const Segment& s, const Rows& panels, const Rows& chunk, const float* shrunk,
            float* sums, int64_t apart) {
  const int64_t stride = s.rank * kPanel;
  const auto* b = static_cast<const typename T::Element*>(s.b) + panels.first * stride;
  for_groups(s, chunk, [&](const Rows& group) {
    const float* a = shrunk + s.offset + (group.first - s.first) * s.rank;
    const Stream idle{reinterpret_cast<const char*>(a), 0};
    float* to = sums + (group.first - chunk.first) * kPanel;
    for (int64_t i = 0; i < panels.count;) {
      const int64_t wide = tile_panels(group.count, panels.count - i);
      tile_for<T>(group.count, wide)({a, b + i * stride, stride, s.rank,
                                      to + i * apart, apart, false, idle, idle});
      i += wide;
    }
  });
}

}  // namespace blockllm
