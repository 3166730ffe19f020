// The register tile: M rows by P panels, sums held in registers over a run of inputs.
//
// Every element of a product is one chain of fused multiply-adds over inputs 0, 1, 2, ...; sums
// that leave the registers between runs are stored and loaded exactly. So a row's result does not
// depend on the tile that computed it, nor on the other rows of the batch.
#pragma once
#include <algorithm>
#include <type_traits>

#include "panel.h"
#include "unfold.h"

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

// Up to how many groups of rows unfold a panel in registers, each for itself, instead of once into
// memory: where registers are few, this costs more.
constexpr int64_t kGroupsInRegisters = kLanes == 16 ? INT64_MAX : 1;

// What a tile reads and writes: `a` is [run][M], sums of panels lie `sums_stride` floats apart. Of
// a tile of several panels, `later` and `far` are not fetched.
template <class Element>
struct TileCall {
  const float* a;
  Laid<Element> weights;
  int64_t run;
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

// What is fetched while a tile takes its inputs: where each stream is, how far it was asked for.
template <class Element, int P>
class Fetches {
 public:
  explicit Fetches(const TileCall<Element>& c)
      : call_(c),
        soon_(c.soon.at),
        soon_end_(soon_),
        later_(c.later.at),
        later_end_(later_),
        far_(c.far.at),
        far_end_(far_) {}

  // Before kAtOnce inputs.
  void next() {
    if constexpr (P > 1) return;
    advance<kOnce>(soon_, soon_end_, call_.soon.pace);
    advance<_MM_HINT_T0>(later_, later_end_, call_.later.pace);
    advance<_MM_HINT_T1>(far_, far_end_, call_.far.pace);
  }
  // Before each of these: of several panels little is computed, and a fetch may be dropped, so that
  // most are asked twice.
  void next_input() {
    if constexpr (P == 1) return;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) _mm_prefetch(soon_ + p * call_.soon.apart, kOnce);
    soon_ += call_.soon.pace;
  }

 private:
  // Asks for the lines of a stream up to its next kAtOnce inputs.
  template <_mm_hint HINT>
  static void advance(const char*& at, const char*& end, int64_t pace) {
    end += kAtOnce * pace;
    for (; at < end; at += 64) _mm_prefetch(at, HINT);
  }

  const TileCall<Element>& call_;
  const char *soon_, *soon_end_;
  const char *later_, *later_end_;
  const char *far_, *far_end_;
};

// Sums of M rows, P panels: of the first and of the other half of each panel's outputs.
template <int M, int P>
struct TileSums {
  Vec low[P][M], high[P][M];
};

// sums[i] += a[i] * weights.
template <int M, int P>
[[gnu::always_inline]] inline void multiply_input(const float* a, const Vec (&w_low)[P],
                                                  const Vec (&w_high)[P], TileSums<M, P>& sums) {
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    const Vec x = fill(a[i]);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      sums.low[p][i] = fma(x, w_low[p], sums.low[p][i]);
      sums.high[p][i] = fma(x, w_high[p], sums.high[p][i]);
    }
  }
}

template <class T, int M, int P>
[[gnu::always_inline]] inline void multiply_input(const float* a,
                                                  const typename T::Element* weights, int64_t apart,
                                                  TileSums<M, P>& sums) {
  Vec w_low[P], w_high[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) T::widen(weights + p * apart, w_low[p], w_high[p]);
  multiply_input<M, P>(a, w_low, w_high, sums);
}

// sums += a[k][i] * weights[k] for k < count.
template <class T, int M, int P>
[[gnu::always_inline]] inline void multiply_inputs(const float* a,
                                                   const typename T::Element* weights,
                                                   int64_t apart, int64_t count,
                                                   Fetches<typename T::Element, P>& fetches,
                                                   TileSums<M, P>& sums) {
  int64_t k = 0;
  for (; k + kAtOnce <= count; k += kAtOnce, weights += kAtOnce * kElements<T>, a += kAtOnce * M) {
    fetches.next();
#pragma GCC unroll 8
    for (int64_t j = 0; j < kAtOnce; ++j) {
      fetches.next_input();
      multiply_input<T, M, P>(a + j * M, weights + j * kElements<T>, apart, sums);
    }
  }
  for (; k < count; ++k, weights += kElements<T>, a += M)
    multiply_input<T, M, P>(a, weights, apart, sums);
}

// The same of the inputs of a block, folded.
template <int M>
[[gnu::always_inline]] inline void multiply_block(const float* a, const FoldedBlock& block,
                                                  Fetches<uint16_t, 1>& fetches,
                                                  TileSums<M, 1>& sums) {
  for (int64_t k = 0; k < kBlockInputs; k += kAtOnce) {
    fetches.next();
#pragma GCC unroll 1
    for (int64_t j = 0; j < kAtOnce; j += 2, a += 2 * M) {
      Bytes words[2];
      block.take((k + j) / 2, words[0], words[1]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        Vec low[1], high[1];
        bfloat_pairs(words[i], low[0], high[0]);
        multiply_input<M, 1>(a + i * M, low, high, sums);
      }
    }
  }
}

// The same of a panel that lies folded.
template <int M>
[[gnu::always_inline]] inline void multiply_folded(const float* a, const Folded& folded,
                                                   int64_t count, Fetches<uint16_t, 1>& fetches,
                                                   TileSums<M, 1>& sums) {
  for (int64_t k = 0; k < count; k += kBlockInputs, a += kBlockInputs * M) {
    const char* block = folded.block(k / kBlockInputs);
    const int64_t inputs = std::min(kBlockInputs, count - k);
    if (inputs == kBlockInputs && is_regular(block)) {
      multiply_block<M>(a, FoldedBlock(block), fetches, sums);
    } else {
      multiply_inputs<BFloat16, M, 1>(a, unfold_apart<PanelOrder>(block), 0, inputs, fetches, sums);
    }
  }
}

// sums[p][i][kPanel] (+)= a[k][i] * weights[p][k][kPanel] for k < run.
template <class T, int M, int P>
void multiply_tile(const TileCall<typename T::Element>& c) {
  TileSums<M, P> sums;
  const bool codes = kMayBeCodes<T> && c.group.scales != nullptr;
  const bool anew = c.first || codes;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const float* from = c.sums + p * c.sums_stride + i * kPanel;
      sums.low[p][i] = anew ? zero() : load(from);
      sums.high[p][i] = anew ? zero() : load(from + kLanes);
    }
  }
  Fetches<typename T::Element, P> fetches(c);
  if constexpr (std::is_same_v<T, BFloat16> && P == 1) {
    if (c.weights.folded) {
      multiply_folded<M>(c.a, c.weights.folded, c.run, fetches, sums);
    } else {
      multiply_inputs<T, M, P>(c.a, c.weights.at, c.weights.apart, c.run, fetches, sums);
    }
  } else {
    multiply_inputs<T, M, P>(c.a, c.weights.at, c.weights.apart, c.run, fetches, sums);
  }
  if constexpr (kMayBeCodes<T>) {
    if (codes)
      return add_group<M, P>(c.group, sums.low, sums.high, c.sums, c.sums_stride, c.first);
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      float* to = c.sums + p * c.sums_stride + i * kPanel;
      store(to, sums.low[p][i]);
      store(to + kLanes, sums.high[p][i]);
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
