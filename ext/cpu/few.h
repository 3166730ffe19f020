// Attention of few queries over one span with dot products of bfloat16s, where a stripe (stripe.h)
// would be mostly empty: lanes are positions while they are scored, and elements while values are
// weighed. Every sum has the order that it has in a stripe, so the bits are the same.
#pragma once
#include "attention.h"
#include "dots.h"
#include "span.h"
#include "stripe.h"
#include "words.h"

namespace blockllm {

#if defined(__AVX512BF16__)

// Below so many queries a stripe takes longer; AMX is done with one before this has begun.
constexpr int64_t kFewQueries = kExactInTiles ? 0 : 12;
constexpr Ahead kPairsAhead{32, 32};

// rows[query][width] of bfloat16, zeros behind `dim`.
inline void round_rows(const float* queries, int64_t count, int64_t dim, uint16_t* rows) {
  const int64_t width = padded(dim);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; d += kDepth)
      _mm512_storeu_si512(rows + i * width + d, rounded(queries + i * dim + d, dim - d));
}

// turned[pair of elements][32 positions][2] of the positions from `first` on, while the next are
// fetched.
inline void turn_keys(const Keys<BFloat16>& keys, int64_t first, uint16_t* turned) {
  for (int64_t d = 0; d < keys.dim; d += kDepth) {
    const __mmask32 some = some_words(keys.dim - d);
    for (int64_t half = 0; half < 2; ++half) {
      __m512i x[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t at = first + half * kSide + i;
        fetch_line<kDepth>(keys.soon_key(at) + d);
        x[i] = _mm512_maskz_loadu_epi16(some, keys.key(at) + d);
      }
      turn_words(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i)
        _mm512_store_si512(turned + (d / 2 + i) * 2 * kDepth + half * kDepth, x[i]);
    }
  }
}

// scores[query][32] of Q queries.
template <int Q>
void score_turned_pairs(const uint16_t* queries, int64_t width, const uint16_t* turned,
                        float* scores) {
  Vec sums[Q][2];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) sums[q][0] = sums[q][1] = zero();
#pragma GCC unroll 4
  for (int64_t pair = 0; pair < width / 2; ++pair) {
    const __m512bh near = pairs(turned + pair * 2 * kDepth);
    const __m512bh far = pairs(turned + pair * 2 * kDepth + kDepth);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const __m512bh x = fill_pairs(queries + q * width + 2 * pair);
      sums[q][0] = _mm512_dpbf16_ps(sums[q][0], near, x);
      sums[q][1] = _mm512_dpbf16_ps(sums[q][1], far, x);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
    store(scores + q * kSpan, sums[q][0]);
    store(scores + q * kSpan + kLanes, sums[q][1]);
  }
}

// weights[16 pairs of positions of each step], and the largest, of the scores at the steps
// [first, last), of which those outside of `seen` are not.
inline float soften_pairs(float* scores, int64_t first, int64_t last, const Positions& seen,
                          uint16_t* weights) {
  for (int64_t j = first * kDepth; j < seen.first; ++j) scores[j] = kUnseen;
  for (int64_t j = seen.last; j < last * kDepth; ++j) scores[j] = kUnseen;
  Vec top = fill(kUnseen);
  for (int64_t j = first * kDepth; j < last * kDepth; j += kLanes) top = max(top, load(scores + j));
  const float maximum = largest(top);
  const Vec base = fill(kBase), shift = shift_of(fill(maximum));
  for (int64_t step = first; step < last; ++step) {
    const float* from = scores + step * kDepth;
    const Vec near = rounded_exp2(fma(load(from), base, shift));
    const Vec far = rounded_exp2(fma(load(from + kLanes), base, shift));
    _mm512_storeu_si512(weights + step * kDepth, paired(near, far));
  }
  return maximum;
}

// One step of weighing: which, of which steps, of which element on.
struct Weighing {
  int64_t step, first, last, d;

  bool begins() const { return step == first; }
  bool ends() const { return step + 1 == last; }
};

// values[query][width] from element `d` on, 16 V of them, and with the first of them sums of the
// weights, (+)= those of a step, weighted, of Q queries. Meanwhile the next step's are fetched.
template <int Q, int V>
void weigh_pairs(const uint16_t* weights, const Keys<BFloat16>& keys, const Weighing& at,
                 float* values, int64_t width, float* sums) {
  Vec total[Q][V], all[Q];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
    all[q] = at.begins() ? zero() : fill(sums[q]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      total[q][v] = at.begins() ? zero() : load(values + q * width + at.d + v * kLanes);
  }
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const int64_t left = keys.dim - at.d;
  const __mmask32 some[2] = {some_words(left), some_words(std::max<int64_t>(0, left - kDepth))};
  for (int64_t i = 0; i < kSide; ++i) {
    const int64_t near = at.step * kDepth + i, far = near + kSide;
    fetch_line<V * kLanes>(keys.soon_value(near) + at.d);
    fetch_line<V * kLanes>(keys.soon_value(far) + at.d);
    __m512bh x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v += 2) {
      const __mmask32 here = near < keys.count ? some[v / 2] : 0;
      const __mmask32 there = far < keys.count ? some[v / 2] : 0;
      const __m512i a = _mm512_maskz_loadu_epi16(here, keys.value(near) + at.d + v * kLanes);
      const __m512i b = _mm512_maskz_loadu_epi16(there, keys.value(far) + at.d + v * kLanes);
      x[v] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      x[v + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const __m512bh weight = fill_pairs(weights + q * kSpan + 2 * i);
      all[q] = _mm512_dpbf16_ps(all[q], weight, ones);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[q][v] = _mm512_dpbf16_ps(total[q][v], x[v], weight);
    }
  }
  // Unpacking left elements 8 k + i of each 32 in the low vector, 8 k + 4 + i in the high one.
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
    if (at.d == 0) sums[q] = _mm512_cvtss_f32(all[q]);
#pragma GCC unroll 2
    for (int v = 0; v < V; v += 2) {
      const Vec a = total[q][v], b = total[q][v + 1];
      float* to = values + q * width + at.d + v * kLanes;
      store(to, at.ends() ? _mm512_permutex2var_ps(a, low, b) : a);
      store(to + kLanes, at.ends() ? _mm512_permutex2var_ps(a, high, b) : b);
    }
  }
}

template <int Q>
void weigh_rows(const uint16_t* weights, const Keys<BFloat16>& keys, Weighing at, float* values,
                int64_t width, float* sums) {
  for (; at.d + 2 * kDepth <= width; at.d += 2 * kDepth)
    weigh_pairs<Q, 4>(weights, keys, at, values, width, sums);
  if (at.d < width) weigh_pairs<Q, 2>(weights, keys, at, values, width, sums);
}

// Calls body(first query, how many) for groups of 3 or single ones.
template <class Body>
void by_threes(int64_t queries, const Body& body) {
  int64_t i = 0;
  for (; i + 3 <= queries; i += 3) body(i, std::integral_constant<int, 3>());
  for (; i < queries; ++i) body(i, std::integral_constant<int, 1>());
}

// What a span says about the queries of some heads: for each, `apart` floats from the one before, a
// Partial with rows of `width`. Keys, then values, of all heads are read in one sweep.
inline void attend_pairs(const uint16_t* query, int64_t queries, const Keys<BFloat16>& keys,
                         int64_t heads, const Seen& seen, float* to, int64_t apart) {
  const int64_t width = padded(keys.dim);
  const int64_t first = seen.begin(0) / kDepth, last = ceil_div(seen.end(queries - 1), kDepth);
  float* scores = scratch<kScores>(heads * queries * kSpan);
  auto* weights = scratch<kWeights, uint16_t>(heads * queries * kSpan);
  auto* turned = scratch<kTurned, uint16_t>(width * kDepth);
  for (int64_t step = first; step < last; ++step) {
    for (int64_t h = 0; h < heads; ++h) {
      turn_keys(keys.behind(h), step * kDepth, turned);
      by_threes(queries, [&](int64_t i, auto some) {
        score_turned_pairs<some>(query + (h * queries + i) * width, width, turned,
                                 scores + (h * queries + i) * kSpan + step * kDepth);
      });
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    const Partial out(to + h * apart, queries);
    for (int64_t i = 0; i < queries; ++i)
      out.maximum[i] =
          soften_pairs(scores + (h * queries + i) * kSpan, first, last,
                       {seen.begin(i), seen.end(i)}, weights + (h * queries + i) * kSpan);
  }
  for (int64_t step = first; step < last; ++step) {
    for (int64_t h = 0; h < heads; ++h) {
      const Partial out(to + h * apart, queries);
      by_threes(queries, [&](int64_t i, auto some) {
        weigh_rows<some>(weights + (h * queries + i) * kSpan + step * kDepth, keys.behind(h),
                         {step, first, last, 0}, out.values + i * width, width, out.sum + i);
      });
    }
  }
}

// Attention of blocks of few queries: a way of rounded.h.
struct Few : InPartials<Few> {
  const Attention<BFloat16>& a;

  explicit Few(const Attention<BFloat16>& made) : a(made) {}

  int64_t width() const { return padded(a.call.dim); }
  int64_t query_floats(int64_t queries) const { return queries * width() / 2; }

  void prepare(const Reach& reach, int64_t head, float* to) const {
    const int64_t queries = a.queries_of(reach), dim = a.call.dim;
    float* ready = scratch<kHead>(kFewQueries * dim);
    for (int64_t i = 0; i < queries; ++i) a.prepare_query(reach, head, i, ready + i * dim);
    round_rows(ready, queries, dim, reinterpret_cast<uint16_t*>(to));
  }

  void attend(const Piece& piece, const float* query, float* out) const {
    const int64_t queries = a.queries_of(piece.reach);
    attend_pairs(reinterpret_cast<const uint16_t*>(query), queries, a.sweep(piece, kPairsAhead),
                 piece.heads.count, a.seen(piece.reach, piece.span), out, floats(queries));
  }
};

#endif

}  // namespace blockllm
