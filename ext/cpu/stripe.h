// Attention of a stripe of 16 queries over one span in tiles: scores, softmax, weighted values.
//
// Everything lies crosswise: a tile of scores is 16 positions by 16 queries, so keys are read from
// their pages as they lie, and softmax runs down the positions in vectors of 16 queries. Weights of
// the positions p and p + 16 share a word, as the second product wants them: values, turned round
// once per span, times weights are 16 elements by 16 queries. A query's sums depend neither on its
// place in the stripe nor on the queries beside it; positions that it may not see have weight zero,
// which adds nothing.
#pragma once
#include <limits>

#include "amx.h"
#include "curves.h"
#include "dots.h"
#include "span.h"
#include "words.h"

namespace blockllm {

#if defined(__AVX512BF16__)

constexpr int64_t kSteps = kSpan / kDepth;  // of positions, in a span
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

// What a span (or all spans so far) says about the queries of a stripe: see Partial.
struct Stripe {
  float* maximum;  // [16]
  float* sum;      // [16]
  float* values;   // [width][16]

  explicit Stripe(float* at) : maximum(at), sum(at + kSide), values(at + 2 * kSide) {}
  static int64_t floats(int64_t width) { return (width + 2) * kSide; }
};

// The positions of a span that each query of a stripe sees: [low, high), and those that all see.
struct Sight {
  alignas(64) int32_t low[kSide];
  alignas(64) int32_t high[kSide];
  int64_t all_low, all_high;
};

// Keys as tiles of 16 positions by 32 elements.
struct KeyTiles {
  const uint16_t* at[kSpan / kSide];
  int64_t stride;  // bytes from a position to the next one
};

inline __mmask32 some_words(int64_t left) {
  return static_cast<__mmask32>(left >= kDepth ? 0xffffffff : (1u << left) - 1);
}

// 32 floats, `left` of which count, to the nearest bfloat16, ties to even.
inline __m512i rounded(const float* x, int64_t left) {
  alignas(64) uint16_t words[kDepth] = {};
  BFloat16::write(x, std::min(left, kDepth), words);
  return _mm512_load_si512(words);
}

// packed[step][pair of elements][query][2] of `count` queries; zeros for the others.
inline void pack_stripe(const float* queries, int64_t count, int64_t dim, uint16_t* packed) {
  for (int64_t d = 0; d < dim; d += kDepth) {
    __m512i x[kSide];
    for (int64_t i = 0; i < kSide; ++i)
      x[i] = i < count ? rounded(queries + i * dim + d, dim - d) : _mm512_setzero_si512();
    turn_words(x);
    for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(packed + i * kDepth, x[i]);
    packed += kTileWeights;
  }
}

// turned[tile of 16 elements][step of 32 positions][element][16 pairs of positions p, p + 16], from
// step `first` on; zeros behind the last position. Meanwhile `fetched` bytes are fetched from each
// key and value on.
inline void turn_values(const Keys<BFloat16>& keys, int64_t first, int64_t fetched,
                        uint16_t* turned) {
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  fetch(keys, first * kDepth, (first + 1) * kDepth, fetched);
  for (int64_t step = first; step * kDepth < keys.count; ++step) {
    fetch(keys, (step + 1) * kDepth, (step + 2) * kDepth, fetched);
    for (int64_t d = 0; d < keys.dim; d += kDepth) {
      const __mmask32 some = some_words(keys.dim - d);
      __m512i x[2][kSide];
      for (int64_t i = 0; i < kDepth; ++i) {
        const int64_t position = step * kDepth + i;
        x[i / kSide][i % kSide] =
            position < keys.count
                ? _mm512_maskz_loadu_epi16(some, keys.at[position] + keys.value_offset + d)
                : _mm512_setzero_si512();
      }
      turn_words(x[0]);
      turn_words(x[1]);
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t tile = (d / kSide + i / 8) * kSteps + step;
        uint16_t* to = turned + tile * kTileWeights + i % 8 * 2 * kDepth;
        const __m512i even = _mm512_or_si512(_mm512_and_si512(x[0][i], low_half),
                                             _mm512_slli_epi32(x[1][i], 16));
        const __m512i odd = _mm512_or_si512(_mm512_srli_epi32(x[0][i], 16),
                                            _mm512_andnot_si512(low_half, x[1][i]));
        _mm512_store_si512(to, even);
        _mm512_store_si512(to + kDepth, odd);
      }
    }
  }
}

// scores[stripe][position][16] at the positions of tiles [first, last), an even number; `steps` of
// elements; `S` stripes, 1 or 2.
template <int S>
void score_tiles(const KeyTiles& keys, int64_t first, int64_t last, const uint16_t* queries,
                 int64_t steps, float* scores) {
  for (int64_t t = first; t < last; t += 2) {
    float* to = scores + t * kSquare;
    multiply_squares<S>({{keys.at[t], keys.at[t + 1]},
                         keys.stride,
                         kDepth,
                         {queries, queries + steps * kTileWeights},
                         steps,
                         {to, to + kSpan * kSide}});
  }
}

// Scores [first, last) of what a query does not see become -infinity.
inline void hide(const Sight& sight, int64_t first, int64_t last, float* scores) {
  const __m512i low = _mm512_load_si512(sight.low), high = _mm512_load_si512(sight.high);
  for (int64_t j = first; j < last; ++j) {
    const __m512i position = _mm512_set1_epi32(static_cast<int>(j));
    const __mmask16 seen = _mm512_cmple_epi32_mask(low, position) &
                           _mm512_cmpgt_epi32_mask(high, position);
    float* at = scores + j * kSide;
    store(at, _mm512_mask_blend_ps(seen, fill(kUnseen), load(at)));
  }
}

// 2^x to the nearest number of 8 significant bits, for x <= 0: a polynomial, fitted to 2.9e-6, of
// what x lies above a whole number, with the rounding in its last sum.
inline Vec rounded_exp2(Vec x) {
  constexpr float kRounding = 98304.0f;  // 1.5 * 2^16: sums keep 7 bits behind the point
  const Vec r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = fma(fill(0.01342669f), r, fill(0.05224247f));
  p = fma(p, r, fill(0.24128021f));
  p = fma(p, r, fill(0.69304484f));
  p = sub(fma(p, r, fill(1.0f + kRounding)), fill(kRounding));
  return scale_pow2(p, x);
}

constexpr float kBase = 1.44269504089f;  // 1 / ln 2

// What makes exponents of kBase * score at most zero; zero where nothing is seen.
inline Vec shift_of(Vec maximum) {
  const Vec lowest = fill(-std::numeric_limits<float>::max());
  return select_less(maximum, lowest, zero(), mul(maximum, fill(-kBase)));
}

// Words of two bfloat16s each, which a and b are as float32.
inline __m512i paired(Vec a, Vec b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(a), 16),
                                 _mm512_castps_si512(b));
}

// weights[step][16 pairs of positions p, p + 16][16 queries][2] of the steps [first, last), with
// the maximum of the scores and the sum of the weights.
inline void soften_stripe(const float* scores, int64_t first, int64_t last, uint16_t* weights,
                          const Stripe& out) {
  Vec top[4];
  for (int i = 0; i < 4; ++i) top[i] = fill(kUnseen);
  for (int64_t j = first * kDepth; j < last * kDepth; j += 4)
    for (int i = 0; i < 4; ++i) top[i] = max(top[i], load(scores + (j + i) * kSide));
  const Vec maximum = max(max(top[0], top[1]), max(top[2], top[3]));
  store(out.maximum, maximum);
  const Vec base = fill(kBase), shift = shift_of(maximum);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  Vec sum = zero();
  for (int64_t step = first; step < last; ++step) {
    const float* from = scores + step * 2 * kSquare;
    uint16_t* to = weights + step * kTileWeights;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSide; ++i) {
      const Vec a = rounded_exp2(fma(load(from + i * kSide), base, shift));
      const Vec b = rounded_exp2(fma(load(from + kSquare + i * kSide), base, shift));
      const __m512i both = paired(a, b);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)both, ones);
      _mm512_store_si512(to + i * kDepth, both);
    }
  }
  store(out.sum, sum);
}

// values[stripe][element][16]: the values of steps [first, last) weighted, S stripes.
template <int S>
void weigh_tiles(const uint16_t* turned, int64_t width, const uint16_t* weights, int64_t first,
                 int64_t last, float* values, float* others) {
  for (int64_t d = 0; d < width; d += kDepth) {
    const uint16_t* even = turned + d * kSpan + first * kTileWeights;
    const uint16_t* own = weights + first * kTileWeights;
    multiply_squares<S>({{even, even + kSteps * kTileWeights},
                         64,
                         kTileWeights,
                         {own, own + kSteps * kTileWeights},
                         last - first,
                         {values + d * kSide, others + d * kSide}});
  }
}

// Folds the next span into those before it; of queries that see nothing of it, nothing changes.
inline void fold_stripe(const Stripe& span, int64_t width, const Stripe& state) {
  const Vec sum = load(span.sum), maximum = load(span.maximum), before = load(state.maximum);
  const auto seen = static_cast<__mmask16>(greater(sum, zero()));
  if (seen == 0) return;
  const Vec top = max(before, maximum);
  const Vec keep = exp(sub(before, top)), take = exp(sub(maximum, top));
  _mm512_mask_storeu_ps(state.maximum, seen, top);
  _mm512_mask_storeu_ps(state.sum, seen, fma(load(state.sum), keep, mul(sum, take)));
  for (int64_t d = 0; d < width; ++d) {
    float* to = state.values + d * kSide;
    const Vec all = add(mul(load(to), keep), mul(load(span.values + d * kSide), take));
    _mm512_mask_storeu_ps(to, seen, all);
  }
}

// Divides by the sums and turns the values back to rows.
inline void write_stripe(const Stripe& state, int64_t count, int64_t dim, float* const* out) {
  const Vec inverse = div(fill(1.0f), load(state.sum));
  for (int64_t d = 0; d < dim; d += kSide) {
    __m512i x[kSide];
    for (int64_t i = 0; i < kSide; ++i)
      x[i] = _mm512_castps_si512(mul(load(state.values + (d + i) * kSide), inverse));
    turn_words(x);
    const auto some = static_cast<__mmask16>(some_words(std::min(kSide, dim - d)));
    for (int64_t i = 0; i < count; ++i) _mm512_mask_storeu_epi32(out[i] + d, some, x[i]);
  }
}

#endif

}  // namespace blockllm
