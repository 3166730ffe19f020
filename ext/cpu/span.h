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
  const typename T::Element* const* at;  // readable for whole vectors of positions
  int64_t count, dim, value_offset;
};

// Brings into the caches `bytes` from each key on, and from its value, ahead of their use. Pages
// lie apart, so the hardware alone foresees little of it.
constexpr int64_t kFetchAhead = 8;  // positions

template <class T>
void fetch(const Keys<T>& keys, int64_t first, int64_t last, int64_t bytes) {
  for (int64_t j = first; j < last && j < keys.count; ++j) {
    const char* k = reinterpret_cast<const char*>(keys.at[j]);
    const char* v = reinterpret_cast<const char*>(keys.at[j] + keys.value_offset);
    for (int64_t at = 0; at < bytes; at += 64) {
      _mm_prefetch(k + at, _MM_HINT_T0);
      _mm_prefetch(v + at, _MM_HINT_T1);
    }
  }
}

// Scores of Q queries at four positions.
template <class T, int Q>
void score_tile(const float* query, const Keys<T>& keys, int64_t first, float* scores) {
  const auto* const* at = keys.at + first;
  Vec total[Q][4];
  for (int q = 0; q < Q; ++q)
    for (int j = 0; j < 4; ++j) total[q][j] = zero();
  int64_t d = 0;
  for (; d + kLanes <= keys.dim; d += kLanes) {
    Vec x[Q];
    for (int q = 0; q < Q; ++q) x[q] = load(query + q * keys.dim + d);
    for (int j = 0; j < 4; ++j) {
      const Vec key = T::row(at[j] + d);
      for (int q = 0; q < Q; ++q) total[q][j] = fma(x[q], key, total[q][j]);
    }
  }
  for (int q = 0; q < Q; ++q) {
    float* to = scores + q * kSpan + first;
    _mm_storeu_ps(to, sums(total[q][0], total[q][1], total[q][2], total[q][3]));
    for (int64_t t = d; t < keys.dim; ++t)
      for (int j = 0; j < 4; ++j) to[j] += query[q * keys.dim + t] * T::value(at[j][t]);
  }
}

// scores[i][j] = <query i, key j>
template <class T>
void score(const float* query, int64_t queries, const Keys<T>& keys, int64_t fetched,
           float* scores) {
  fetch(keys, 0, kFetchAhead, fetched);
  for (int64_t j = 0; j < keys.count; j += 4) {
    fetch(keys, j + kFetchAhead, j + kFetchAhead + 4, fetched);
    int64_t i = 0;
    for (; i + 3 <= queries; i += 3)
      score_tile<T, 3>(query + i * keys.dim, keys, j, scores + i * kSpan);
    for (; i < queries; ++i)
      score_tile<T, 1>(query + i * keys.dim, keys, j, scores + i * kSpan);
  }
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

// values[q][0 .. D vectors) = sum over positions of weight times value, from element `d` on.
template <class T, int Q, int D>
void weigh_tile(const float* weights, const Keys<T>& keys, Positions seen, int64_t d, float* out) {
  Vec total[Q][D];
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < D; ++i) total[q][i] = zero();
  for (int64_t j = seen.first; j < seen.last; ++j) {
    const auto* value = keys.at[j] + keys.value_offset + d;
    Vec x[D];
    for (int i = 0; i < D; ++i) x[i] = T::row(value + i * kLanes);
    for (int q = 0; q < Q; ++q) {
      const Vec weight = fill(weights[q * kSpan + j]);
      for (int i = 0; i < D; ++i) total[q][i] = fma(weight, x[i], total[q][i]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int i = 0; i < D; ++i) store(out + q * keys.dim + d + i * kLanes, total[q][i]);
}

template <class T, int Q>
void weigh_queries(const float* weights, const Keys<T>& keys, Positions seen, float* out) {
  constexpr int kWide = kLanes == 8 && Q > 3 ? 2 : 4;  // as many sums as registers hold
  int64_t d = 0;
  for (; d + kWide * kLanes <= keys.dim; d += kWide * kLanes)
    weigh_tile<T, Q, kWide>(weights, keys, seen, d, out);
  for (; d + kLanes <= keys.dim; d += kLanes) weigh_tile<T, Q, 1>(weights, keys, seen, d, out);
  for (; d < keys.dim; ++d) {
    for (int q = 0; q < Q; ++q) {
      float total = 0;
      for (int64_t j = seen.first; j < seen.last; ++j)
        total += weights[q * kSpan + j] * T::value(keys.at[j][keys.value_offset + d]);
      out[q * keys.dim + d] = total;
    }
  }
}

// The values that Q queries from the i-th on see, weighted, into out [queries, dim].
template <class T, int Q>
void weigh_seen(const float* weights, const Keys<T>& keys, const Seen& seen, int64_t i,
                float* out) {
  const Positions positions{seen.begin(i), seen.end(i + Q - 1)};
  weigh_queries<T, Q>(weights + i * kSpan, keys, positions, out + i * keys.dim);
}

// out [queries, dim]: the values weighted.
template <class T>
void weigh(const float* weights, int64_t queries, const Keys<T>& keys, const Seen& seen,
           float* out) {
  int64_t i = 0;
  for (; i + 6 <= queries; i += 6) weigh_seen<T, 6>(weights, keys, seen, i, out);
  for (; i + 3 <= queries; i += 3) weigh_seen<T, 3>(weights, keys, seen, i, out);
  for (; i < queries; ++i) weigh_seen<T, 1>(weights, keys, seen, i, out);
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
