// Low-rank attachments of a batch: rows are shrunk by A once per call, then expanded by B tile by
// tile upon the sums of the product they are added to.
//
// A keeps its rows, B lies in panels. Both are read in their stored precision. The shrunk rows of a
// segment lie by groups (see chunk.h) of its rows within each chunk: a group that begins at row r
// lies at offset + (r - first) * rank, as [rank][rows of the group].
#pragma once
#include <algorithm>

#include "chunk.h"
#include "dots.h"
#include "pieces.h"
#include "tile.h"

namespace blockllm {

// Rows of a tile, and its columns: as many sums as registers hold.
constexpr int kShrinkRows = 4;
constexpr int shrink_columns(int rows) { return kLanes == 8 && rows == 4 ? 2 : 4; }

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

// Rows as dot products take them: T::kInputs elements at a time, from float32,
template <class T>
struct ByFloats : T {
  static constexpr int64_t kInputs = kLanes;
  static float input(float x) { return x; }
  static Vec inputs(const float* x) { return load(x); }
  static Vec factors(const typename T::Element* a) { return T::row(a); }
  static Vec add(Vec y, Vec x, Vec a) { return fma(x, a, y); }
};

// where R of them lie one behind the other,
template <class T, int R>
struct Apart {
  const float* x;
  int64_t width;

  auto inputs(int r, int64_t k) const { return T::inputs(x + r * width + k); }
  float input(int r, int64_t k) const { return T::input(x[r * width + k]); }
};

#if defined(__AVX512BF16__)

// or in pairs, rounded to bfloat16,
struct ByPairs : BFloat16 {
  static constexpr int64_t kInputs = 2 * kLanes;
  static float input(float x) {
    uint16_t rounded;
    write(&x, 1, &rounded);
    return value(rounded);
  }
  static __m512bh inputs(const float* x) {
    return _mm512_cvtne2ps_pbh(load(x + kLanes), load(x));
  }
  static __m512bh factors(const uint16_t* a) { return pairs(a); }
  static Vec add(Vec y, __m512bh x, __m512bh a) { return _mm512_dpbf16_ps(y, x, a); }
};

// or rounded before, in one piece (pieces.h).
template <int R>
struct AsCut {
  const uint16_t* at[R];
  int64_t apart[R];  // elements, from step to step

  AsCut(const Groups& groups, const uint16_t* pieces, int64_t first, int64_t width) {
    for (int r = 0; r < R; ++r) {
      const Rows group = groups.group(groups.with(first + r));
      at[r] = pieces + groups.size(group.first, width) + (first + r - group.first) * kDepth;
      apart[r] = group.count * kDepth;
    }
  }
  __m512bh inputs(int r, int64_t k) const { return pairs(at[r] + k / kDepth * apart[r]); }
  float input(int r, int64_t k) const {
    return BFloat16::value(at[r][k / kDepth * apart[r] + k % kDepth]);
  }
};

#endif

// Dot products of R rows of x with J rows of A: out[j * stride + r]. Meanwhile what lies at `soon`
// is fetched, as much as is read of A.
template <class T, int R, int J, class Rows>
void shrink_tile(const Rows& x, const typename T::Element* a, const typename T::Element* soon,
                 int64_t width, float scale, float* out, int64_t stride) {
  constexpr int kSums = (R * J + 3) / 4 * 4;
  Vec total[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) total[i] = zero();
  int64_t k = 0;
  for (; k + T::kInputs <= width; k += T::kInputs) {
    decltype(x.inputs(0, 0)) row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = x.inputs(r, k);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(soon + j * width + k), kOnce);
      const auto factor = T::factors(a + j * width + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[j * R + r] = T::add(total[j * R + r], row[r], factor);
    }
  }
  float values[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += 4)
    _mm_storeu_ps(values + i, sums(total[i], total[i + 1], total[i + 2], total[i + 3]));
  for (int j = 0; j < J; ++j) {
    for (int r = 0; r < R; ++r) {
      float value = values[j * R + r];
      for (int64_t t = k; t < width; ++t) value += x.input(r, t) * T::value(a[j * width + t]);
      out[j * stride + r] = scale * value;
    }
  }
}

// What is computed at once: ranks [first, first + count) of one group of a segment's rows. `next`
// is what the thread reads next, as long as a tile's share of A.
struct Shrink {
  const Segment* segment;
  Rows group, ranks;
  float* shrunk;
  const void* next;

  const void* factors(int64_t width) const {
    return static_cast<const char*>(segment->a) +
           ranks.first * width * element_bytes(segment->a_storage);
  }
};

template <class T, int R, class Rows>
void shrink_rows(const Shrink& s, const Rows& x, int64_t width, float scale, float* out) {
  using Element = typename T::Element;
  const auto* a = static_cast<const Element*>(s.factors(width));
  const auto* next = static_cast<const Element*>(s.next);
  constexpr int kColumns = shrink_columns(R);
  const int64_t stride = s.group.count, last = s.ranks.count;
  int64_t j = 0;
  for (; j + kColumns <= last; j += kColumns) {
    const Element* own = a + j * width;
    const Element* soon = j + kColumns < last ? own + kColumns * width : next;
    shrink_tile<T, R, kColumns>(x, own, soon, width, scale, out + j * stride, stride);
  }
  for (; j < last; ++j)
    shrink_tile<T, R, 1>(x, a + j * width, next, width, scale, out + j * stride, stride);
}

// shrunk[j][i] = scale * <x[i], A[j]>, by dot products of T; of(first row, how many) are rows.
template <class T, class Of>
void shrink_by(const Shrink& s, int64_t width, const Of& of) {
  const Segment& segment = *s.segment;
  const Rows& group = s.group;
  const auto scale = static_cast<float>(segment.scale);
  float* out = s.shrunk + segment.offset + (group.first - segment.first) * segment.rank +
               s.ranks.first * group.count;
  const int64_t parts = ceil_div(group.count, kShrinkRows);
  for (int64_t i = 0; i < parts; ++i) {
    const Rows some = part(group.count, parts, i);
    const auto tiles = [&](auto count) {
      shrink_rows<T, decltype(count)::value>(s, of(group.first + some.first, count), width, scale,
                                             out + some.first);
    };
    switch (some.count) {
      case 1:
        tiles(std::integral_constant<int, 1>());
        break;
      case 2:
        tiles(std::integral_constant<int, 2>());
        break;
      case 3:
        tiles(std::integral_constant<int, 3>());
        break;
      default:
        tiles(std::integral_constant<int, kShrinkRows>());
    }
  }
}

template <class T>
void shrink_floats(const Shrink& s, const float* rows, int64_t width) {
  shrink_by<T>(s, width, [&](int64_t first, auto count) {
    return Apart<T, decltype(count)::value>{rows + first * width, width};
  });
}

// The same as A is stored; where rounding is allowed, rows may be rounded to bfloat16.
inline void shrink(const Shrink& s, const float* rows, int64_t width, bool rounding) {
#if defined(__AVX512BF16__)
  if (rounding && s.segment->a_storage == Storage::kBF16)
    return shrink_floats<ByPairs>(s, rows, width);
#endif
  with_storage(s.segment->a_storage,
               [&](auto type) { shrink_floats<ByFloats<decltype(type)>>(s, rows, width); });
}

// The same bits, of rows that were rounded to one piece each: a chunk's, the first of which is
// `first`. A is of bfloat16.
inline void shrink_cut(const Shrink& s, const Groups& groups, const uint16_t* pieces, int64_t first,
                       int64_t width) {
#if defined(__AVX512BF16__)
  shrink_by<ByPairs>(s, width, [&](int64_t row, auto count) {
    return AsCut<decltype(count)::value>(groups, pieces, row - first, width);
  });
#endif
}

// What `expand` will read of a segment's B for some panels.
inline Stream piece_of(const Segment& s, const Rows& panels, int64_t steps) {
  const int64_t stride = s.rank * kPanel * element_bytes(s.b_storage);
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
    const Stream idle{reinterpret_cast<const char*>(a), 0, 0};
    float* to = sums + (group.first - chunk.first) * kPanel;
    for (int64_t i = 0; i < panels.count;) {
      const int64_t wide = tile_panels(group.count, panels.count - i);
      tile_for<T>(group.count, wide)({a, {b + i * stride, stride}, s.rank,
                                      to + i * apart, apart, false, idle, idle});
      i += wide;
    }
  });
}

}  // namespace blockllm
