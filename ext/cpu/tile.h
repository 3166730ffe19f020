// The register tile: M rows by P panels, sums held in registers over a run of inputs.
//
// Every element of a product is one chain of fused multiply-adds over inputs 0, 1, 2, ...; sums
// that leave the registers between runs are stored and loaded exactly. So a row's result does not
// depend on the tile that computed it, nor on the other rows of the batch.
#pragma once
#include <algorithm>

#include "panel.h"

namespace blockllm {

// Bytes that fetches of a stream run ahead of its use, where the hardware's stop at each 4 KiB
// page.
constexpr int64_t kAhead = 2560;

// Memory to fetch meanwhile: `pace` bytes per input, for each panel of a tile of several `apart`
// bytes behind those of the one before.
struct Stream {
  const char* at;
  int64_t pace, apart;
};

// Elements of a panel that one input takes.
template <class T>
constexpr int64_t kElements = kPanel;

// Whether elements may be codes, alone or turned into floats.
template <class T>
constexpr bool kMayBeCodes = false;
template <>
constexpr bool kMayBeCodes<Float32> = true;

// How sums over one group of codes become sums over the weights that they stand for (grouped.h):
// y += scale * sum (+ offset * the sum of the row's inputs).
struct Group {
  const uint16_t* scales = nullptr;  // bfloat16 [kPanel]; null: these are no codes
  int64_t stride = 0;                // from a panel's scales to the next one's
  const float* row_sums = nullptr;   // [M], where there are offsets: behind the scales
};

// What a tile reads and writes: `a` is [run][M], panels lie `panel_stride` elements apart, their
// sums `sums_stride` floats. Of a tile of several panels, `later` and `far` are not fetched.
template <class Element>
struct TileCall {
  const float* a;
  const Element* weights;
  int64_t panel_stride, run;
  float* sums;
  int64_t sums_stride;
  bool first;  // sums begin at zero
  Stream soon, later;
  Group group = {};
  Stream far = {};  // into the second-level cache; of a tile of one panel
};

// Adds the sums over a group of codes to those of the weights.
template <int M, int P>
void add_group(const Group& group, const Vec (&low)[P][M], const Vec (&high)[P][M], float* sums,
               int64_t stride, bool first) {
  for (int p = 0; p < P; ++p) {
    const uint16_t* scales = group.scales + p * group.stride;
    const Vec scale_low = bfloat_to_float(scales);
    const Vec scale_high = bfloat_to_float(scales + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      float* to = sums + p * stride + i * kPanel;
      Vec y_low = fma(scale_low, low[p][i], first ? zero() : load(to));
      Vec y_high = fma(scale_high, high[p][i], first ? zero() : load(to + kLanes));
      if (group.row_sums != nullptr) {
        const Vec x = fill(group.row_sums[i]);
        y_low = fma(x, bfloat_to_float(scales + kPanel), y_low);
        y_high = fma(x, bfloat_to_float(scales + kPanel + kLanes), y_high);
      }
      store(to, y_low);
      store(to + kLanes, y_high);
    }
  }
}

// Inputs that a tile takes at once: what is not a product, such as fetches and counting, costs
// little beside so many.
constexpr int64_t kAtOnce = 8;

// Asks for the lines of a stream up to its next kAtOnce inputs.
template <_mm_hint HINT>
inline void advance(const char*& at, const char*& end, int64_t pace) {
  end += kAtOnce * pace;
  for (; at < end; at += 64) _mm_prefetch(at, HINT);
}

// low, high [p][i] += a[i] * weights[p].
template <class T, int M, int P>
[[gnu::always_inline]] inline void multiply_input(const float* a,
                                                  const typename T::Element* weights,
                                                  int64_t panel_stride, Vec (&low)[P][M],
                                                  Vec (&high)[P][M]) {
  Vec w_low[P], w_high[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) T::widen(weights + p * panel_stride, w_low[p], w_high[p]);
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    const Vec x = fill(a[i]);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      low[p][i] = fma(x, w_low[p], low[p][i]);
      high[p][i] = fma(x, w_high[p], high[p][i]);
    }
  }
}

// sums[p][i][kPanel] (+)= a[k][i] * weights[p][k][kPanel] for k < run.
template <class T, int M, int P>
void multiply_tile(const TileCall<typename T::Element>& c) {
  using Element = typename T::Element;
  Vec low[P][M], high[P][M];
  const bool codes = kMayBeCodes<T> && c.group.scales != nullptr;
  const bool anew = c.first || codes;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const float* from = c.sums + p * c.sums_stride + i * kPanel;
      low[p][i] = anew ? zero() : load(from);
      high[p][i] = anew ? zero() : load(from + kLanes);
    }
  }
  const float* a = c.a;
  const Element* weights = c.weights;
  const char *soon = c.soon.at, *soon_end = soon;
  const char *later = c.later.at, *later_end = later;
  const char *far = c.far.at, *far_end = far;
  int64_t k = 0;
  for (; k + kAtOnce <= c.run; k += kAtOnce) {
    if constexpr (P == 1) {
      advance<_MM_HINT_T0>(soon, soon_end, c.soon.pace);
      advance<_MM_HINT_T0>(later, later_end, c.later.pace);
      advance<_MM_HINT_T1>(far, far_end, c.far.pace);
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < kAtOnce; ++j) {
      const Element* at = weights + j * kElements<T>;
      if constexpr (P > 1) {  // little is computed and a fetch may be dropped: most are asked twice
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) _mm_prefetch(soon + p * c.soon.apart, _MM_HINT_T0);
        soon += c.soon.pace;
      }
      multiply_input<T, M, P>(a + j * M, at, c.panel_stride, low, high);
    }
    weights += kAtOnce * kElements<T>;
    a += kAtOnce * M;
  }
  for (; k < c.run; ++k, weights += kElements<T>, a += M)
    multiply_input<T, M, P>(a, weights, c.panel_stride, low, high);
  if constexpr (kMayBeCodes<T>) {
    if (codes) return add_group<M, P>(c.group, low, high, c.sums, c.sums_stride, c.first);
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      float* to = c.sums + p * c.sums_stride + i * kPanel;
      store(to, low[p][i]);
      store(to + kLanes, high[p][i]);
    }
  }
}

// How many panels a tile of `rows` rows spans: enough independent sums to hide the latency of a
// multiply-add (two per cycle, four cycles: eight).
constexpr int panels_per_tile(int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

// The panels of the next tile, where `left` remain.
inline int64_t tile_panels(int64_t rows, int64_t left) {
  return std::min<int64_t>(panels_per_tile(rows), left);
}

template <class T>
using TileFunction = void (*)(const TileCall<typename T::Element>&);

template <class T, int M>
TileFunction<T> tile_of_rows(int64_t panels) {
  if constexpr (M == 1) {
    if (panels == 4) return multiply_tile<T, M, 4>;
    if (panels == 3) return multiply_tile<T, M, 3>;
  }
  if constexpr (M <= 2) {
    if (panels == 2) return multiply_tile<T, M, 2>;
  }
  return multiply_tile<T, M, 1>;
}

// The tile for `rows` <= kTileRows and as many panels as `tile_panels` says.
template <class T, int M = 1>
TileFunction<T> tile_for(int64_t rows, int64_t panels) {
  if constexpr (M < kTileRows) {
    if (rows > M) return tile_for<T, M + 1>(rows, panels);
  }
  return tile_of_rows<T, M>(panels);
}

}  // namespace blockllm
