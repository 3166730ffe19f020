// Attention of some queries over one span of at most kSpan positions: scores, softmax, weighted
// values.
//
// Every score and every weighted value is one chain of sums in a fixed order, whatever the number
// of queries; positions that a query may not see have weight zero, which adds nothing.
#pragma once
#include <algorithm>
#include <limits>

#include "curves.h"
#include "panel.h"
#include "scratch.h"

namespace blockllm {

constexpr int64_t kSpan = 128;
// A sweep reads up to so many positions at once, behind the last as if it were many.
constexpr int64_t kReadAtOnce = 32;
// How many positions ahead it fetches.
struct Ahead {
  int64_t keys, values;
};

// What a span (or all spans so far) says about each query: the largest score, the sum of
// exp(score - maximum) and the values weighted so.
struct Partial {
  float* maximum;  // [queries], readable and writable for whole vectors
  float* sum;      // the same
  float* values;   // [queries, dim]

  Partial(float* at, int64_t queries)
      : maximum(at), sum(at + whole(queries)), values(at + 2 * whole(queries)) {}
  static int64_t floats(int64_t queries, int64_t dim) { return 2 * whole(queries) + queries * dim; }
  static int64_t whole(int64_t queries) { return (queries + kLanes - 1) / kLanes * kLanes; }
};

// Which positions of a span its queries see: [begin(i), end(i)). The `group` queries of a row see
// the same, those of the next row one position further on.
struct Seen {
  int64_t low, high;  // of the first row; may lie outside of the span
  int64_t group, count;

  int64_t begin(int64_t i) const { return std::clamp<int64_t>(low + i / group, 0, count); }
  int64_t end(int64_t i) const { return std::clamp<int64_t>(high + i / group, 0, count); }
};

// Where the keys of a span lie, and their values, `value_offset` elements behind them.
template <class T>
struct Keys {
  using Element = typename T::Element;

  // Readable up to kSpan: behind `count` the last again.
  const Element* const* at;
  int64_t count, dim, value_offset;
  int64_t shift = 0;  // from `at` to the keys of the head
  // What a sweep fetches as it reads the key, or the value, of a position.
  const Element* const* soon_at_key = nullptr;
  const Element* const* soon_at_value = nullptr;

  const Element* key(int64_t j) const { return at[j] + shift; }
  const Element* value(int64_t j) const { return key(j) + value_offset; }
  // Those of the head that lies so many heads behind.
  Keys behind(int64_t heads) const {
    Keys keys = *this;
    keys.shift += heads * dim;
    return keys;
  }
  const Element* soon_key(int64_t j) const { return soon_at_key[j] + shift; }
  const Element* soon_value(int64_t j) const { return soon_at_value[j] + shift; }
};

// Brings into the caches `bytes` from each key on, and from its value, ahead of their use. Pages
// lie apart, so the hardware alone foresees little of it.
template <class T>
void fetch(const Keys<T>& keys, int64_t first, int64_t last, int64_t bytes) {
  for (int64_t j = first; j < last && j < keys.count; ++j) {
    const char* k = reinterpret_cast<const char*>(keys.key(j));
    const char* v = reinterpret_cast<const char*>(keys.value(j));
    for (int64_t at = 0; at < bytes; at += 64) {
      _mm_prefetch(k + at, _MM_HINT_T0);
      _mm_prefetch(v + at, _MM_HINT_T1);
    }
  }
}

// The lines of N elements. A core drops what is asked for while it waits for as much as it can:
// lines are asked for one by one, between products.
template <int N, class Element>
void fetch_line(const Element* from) {
#pragma GCC unroll 4
  for (size_t at = 0; at < N * sizeof(Element); at += 64)
    _mm_prefetch(reinterpret_cast<const char*>(from) + at, _MM_HINT_T0);
}

// Replaces scores [low, high) by exp(score - maximum), the others below `count` by zero.
inline void soften(float* scores, int64_t low, int64_t high, int64_t count, float& maximum,
                   float& total) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const int64_t padded = (high + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = 0; j < low && j < padded; ++j) scores[j] = kNever;
  for (int64_t j = high; j < padded; ++j) scores[j] = kNever;
  Vec top = fill(kNever);
  for (int64_t j = 0; j < padded; j += kLanes) top = max(top, load(scores + j));
  maximum = largest(top);
  const Vec shift = fill(maximum == kNever ? 0.0f : maximum);
  Vec all = zero();
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = exp_below(sub(load(scores + j), shift));
    store(scores + j, weight);
    all = add(all, weight);
  }
  for (int64_t j = padded; j < count; ++j) scores[j] = 0.0f;
  total = sum(all);
}

// Positions [first, last) of a span.
struct Positions {
  int64_t first, last;
};

// values[q][0 .. D vectors) (+)= the sum over positions of weight times value, from element `d` on.
// What a sweep wants is fetched.
template <class T, bool SWEEPS, int Q, int D>
void weigh_tile(const float* weights, const Keys<T>& keys, Positions seen, int64_t d, bool anew,
                float* out) {
  Vec total[Q][D];
#pragma GCC unroll 6
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i)
      total[q][i] = anew ? zero() : load(out + q * keys.dim + d + i * kLanes);
  for (int64_t j = seen.first; j < seen.last; ++j) {
    const auto* value = keys.value(j) + d;
    if constexpr (SWEEPS) fetch_line<D * kLanes>(keys.soon_value(j) + d);
    const auto element = [&](int i) { return T::row(value + i * kLanes); };
    const auto weight = [&](int q) { return fill(weights[q * kSpan + j]); };
    constexpr int kHeld = std::min(Q, D);  // the fewer of both stay in registers
    Vec held[kHeld];
#pragma GCC unroll 4
    for (int i = 0; i < kHeld; ++i) held[i] = Q < D ? weight(i) : element(i);
    if constexpr (Q < D) {
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) {
        const Vec x = element(i);
#pragma GCC unroll 6
        for (int q = 0; q < Q; ++q) total[q][i] = fma(held[q], x, total[q][i]);
      }
    } else {
#pragma GCC unroll 6
      for (int q = 0; q < Q; ++q) {
        const Vec x = weight(q);
#pragma GCC unroll 4
        for (int i = 0; i < D; ++i) total[q][i] = fma(x, held[i], total[q][i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) store(out + q * keys.dim + d + i * kLanes, total[q][i]);
}

template <class T, bool SWEEPS, int Q>
void weigh_queries(const float* weights, const Keys<T>& keys, Positions seen, bool anew,
                   float* out) {
  constexpr int kWide = kLanes == 8 && Q > 3 ? 2 : 4;  // as many sums as registers hold
  int64_t d = 0;
  for (; d + kWide * kLanes <= keys.dim; d += kWide * kLanes)
    weigh_tile<T, SWEEPS, Q, kWide>(weights, keys, seen, d, anew, out);
  for (; d + kLanes <= keys.dim; d += kLanes)
    weigh_tile<T, SWEEPS, Q, 1>(weights, keys, seen, d, anew, out);
  for (; d < keys.dim; ++d) {
    for (int q = 0; q < Q; ++q) {
      float total = anew ? 0 : out[q * keys.dim + d];
      for (int64_t j = seen.first; j < seen.last; ++j)
        total += weights[q * kSpan + j] * T::value(keys.value(j)[d]);
      out[q * keys.dim + d] = total;
    }
  }
}

// What some queries see of a span, within `some` positions: the first of several such calls, one
// behind the other, begins `anew`.
struct Sweep {
  const Seen& seen;
  Positions some;
  bool anew;
};

// The values that Q queries from the i-th on see, weighted, into out [queries, dim].
template <class T, bool SWEEPS, int Q>
void weigh_seen(const float* weights, const Keys<T>& keys, const Sweep& sweep, int64_t i,
                float* out) {
  const Positions positions{std::max(sweep.some.first, sweep.seen.begin(i)),
                            std::min(sweep.some.last, sweep.seen.end(i + Q - 1))};
  weigh_queries<T, SWEEPS, Q>(weights + i * kSpan, keys, positions, sweep.anew, out + i * keys.dim);
}

// out [queries, dim]: the values weighted.
template <class T, bool SWEEPS = false>
void weigh(const float* weights, int64_t queries, const Keys<T>& keys, const Sweep& sweep,
           float* out) {
  int64_t i = 0;
  for (; i + 6 <= queries; i += 6) weigh_seen<T, SWEEPS, 6>(weights, keys, sweep, i, out);
  for (; i + 3 <= queries; i += 3) weigh_seen<T, SWEEPS, 3>(weights, keys, sweep, i, out);
  for (; i < queries; ++i) weigh_seen<T, SWEEPS, 1>(weights, keys, sweep, i, out);
}

// Folds the next span into the state of those before it. A span that a query does not see leaves
// its state as it is.
inline void merge(const Partial& span, int64_t queries, int64_t dim, const Partial& state) {
  for (int64_t i = 0; i < queries; i += kLanes) {
    const Vec before = load(state.maximum + i), own = load(span.maximum + i);
    const Vec top = max(before, own), sum = load(span.sum + i);
    alignas(64) float keep[kLanes], take[kLanes];
    store(take, select_less(zero(), sum, exp(sub(own, top)), zero()));
    store(keep, select_less(zero(), sum, exp(sub(before, top)), fill(1.0f)));
    store(state.maximum + i, select_less(zero(), sum, top, before));
    store(state.sum + i, fma(load(state.sum + i), load(keep), mul(sum, load(take))));
    const int64_t count = std::min<int64_t>(kLanes, queries - i);
    for (int64_t j = 0; j < count; ++j) {
      if (span.sum[i + j] == 0.0f) continue;
      float* to = state.values + (i + j) * dim;
      const float* from = span.values + (i + j) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = to[d] * keep[j] + from[d] * take[j];
    }
  }
}

}  // namespace blockllm
