// Rows as tiles multiply them: in pieces of bfloat16, in groups of at most kHeight.
//
// A float32 has 24 significant bits and is cut, without loss, into three pieces of 8: high + middle
// + low; each piece times a bfloat16 weight is exact in float32. Where rounding is allowed, a row
// is one piece: its bfloat16s, to nearest even.
//
// A group lies as [inputs / 32][pieces][height][32].
#pragma once
#include <algorithm>

#include "scratch.h"
#include "tiles.h"

namespace blockllm {

constexpr int64_t kExactPieces = 3;

// How rows are divided into as few groups as there can be: of one height, where several are
// multiplied at once, so that the last may have room for more rows than are left (what lies there
// is never written nor its products read), else of heights that differ by one at most.
struct Groups {
  int64_t rows, count, pieces;

  Groups(int64_t of_rows, int64_t pieces_of_each)
      : rows(of_rows), count(ceil_div(of_rows, kHeight)), pieces(pieces_of_each) {}

  // Of the highest group.
  int64_t height() const { return ceil_div(rows, count); }
  Rows group(int64_t i) const {
    return kGroupsAtOnce > 1 ? Rows{i * height(), height()} : part(rows, count, i);
  }
  // All of them, in this thread's scratch.
  const Rows* list() const {
    auto* const all = scratch<kGroupList, Rows>(count);
    for (int64_t i = 0; i < count; ++i) all[i] = group(i);
    return all;
  }
  // The group that has a row.
  int64_t with(int64_t row) const {
    return kGroupsAtOnce > 1 ? row / height() : part_with(rows, count, row);
  }
  // Rows that there is room for.
  int64_t room() const { return kGroupsAtOnce > 1 ? count * height() : rows; }
  // Elements that so many rows of `width` take.
  int64_t size(int64_t of_rows, int64_t width) const {
    return of_rows * pieces * steps_of(width) * kDepth;
  }
  int64_t size(int64_t width) const { return size(room(), width); }
};

#if defined(__AVX512BF16__)

// kDepth floats, of which `left` count, as three vectors of bfloat16, `apart` elements from each
// other.
inline void cut(const float* x, int64_t left, uint16_t* to, int64_t apart) {
  for (int64_t half = 0; half < kDepth; half += 16, left -= 16) {
    const __mmask16 some =
        static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
    __m512 rest = _mm512_maskz_loadu_ps(some, x + half);
    for (int64_t piece = 0; piece < kExactPieces; ++piece) {
      const __m512i bits = _mm512_castps_si512(rest);
      const __m512i top = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + piece * apart + half),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
      rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(top));
    }
  }
}

// The same, rounded.
inline void round_off(const float* x, int64_t left, uint16_t* to) {
  const uint32_t some = left >= kDepth ? 0xffffffffu : (1u << left) - 1;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some), x);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some >> 16), x + 16);
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Writes the pieces of kDepth elements of a row, of which `left` count, `apart` elements from each
// other.
inline void cut_step(const Groups& groups, const float* elements, int64_t left, uint16_t* to,
                     int64_t apart) {
  if (groups.pieces == 1) {
    round_off(elements, left, to);
  } else {
    cut(elements, left, to, apart);
  }
}

// Writes the pieces of the i-th row.
inline void cut_row(const Groups& groups, int64_t i, const float* row, int64_t width,
                    uint16_t* pieces) {
  const Rows group = groups.group(groups.with(i));
  const int64_t apart = group.count * kDepth;
  uint16_t* to = pieces + groups.size(group.first, width) + (i - group.first) * kDepth;
  for (int64_t k = 0; k < width; k += kDepth, to += groups.pieces * apart)
    cut_step(groups, row + k, width - k, to, apart);
}

// Writes the pieces of the elements [k, k + kDepth) of all rows, [rows][kDepth].
inline void cut_column(const Groups& groups, int64_t k, const float* elements, int64_t width,
                       uint16_t* pieces) {
  for (int64_t g = 0; g < groups.count; ++g) {
    const Rows group = groups.group(g);
    const int64_t apart = group.count * kDepth, last = group.first + group.count;
    uint16_t* to = pieces + groups.size(group.first, width) + k / kDepth * groups.pieces * apart;
    for (int64_t i = group.first; i < std::min(last, groups.rows); ++i, to += kDepth)
      cut_step(groups, elements + i * kDepth, width - k, to, apart);
  }
}

#else

inline void cut_row(const Groups&, int64_t, const float*, int64_t, uint16_t*) {}
inline void cut_column(const Groups&, int64_t, const float*, int64_t, uint16_t*) {}

#endif

}  // namespace blockllm
