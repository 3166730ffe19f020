// Attention of some queries over one span of at most kSpan positions: scores, softmax, weighted
// values.
//
// Every score and every weighted value is one chain of sums in a fixed order, whatever the number
// of queries; positions that a query may not see have weight zero, which adds nothing.
#pragma once
#include <cmath>
#include <limits>

#include "curves.h"
#include "scratch.h"

namespace blockllm {

constexpr int64_t kSpan = 128;

// What a span (or all spans so far) says about each query: the largest score, the sum of
// exp(score - maximum) and the values weighted so.
struct Partial {
  float* maximum;  // [queries]
  float* sum;      // [queries]
  float* values;   // [queries, dim]

  Partial(float* at, int64_t queries) : maximum(at), sum(at + queries), values(at + 2 * queries) {}
  static int64_t floats(int64_t queries, int64_t dim) { return queries * (dim + 2); }
};

// Scores of Q queries at four positions.
template <int Q>
void score_tile(const float* const* query, const float* const* keys, int64_t dim, float* scores) {
  Vec total[Q][4];
  for (int q = 0; q < Q; ++q)
    for (int j = 0; j < 4; ++j) total[q][j] = zero();
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec x[Q];
    for (int q = 0; q < Q; ++q) x[q] = load(query[q] + d);
    for (int j = 0; j < 4; ++j) {
      const Vec key = load(keys[j] + d);
      for (int q = 0; q < Q; ++q) total[q][j] = fma(x[q], key, total[q][j]);
    }
  }
  for (int q = 0; q < Q; ++q) {
    _mm_storeu_ps(scores + q * kSpan, sums(total[q][0], total[q][1], total[q][2], total[q][3]));
    for (int64_t t = d; t < dim; ++t)
      for (int j = 0; j < 4; ++j) scores[q * kSpan + j] += query[q][t] * keys[j][t];
  }
}

// What to bring into the caches ahead of its use: `bytes` from each key on, and from its value,
// which lies `value_offset` floats behind it. Pages lie apart, so the hardware alone foresees
// little of it.
struct Fetch {
  int64_t value_offset, bytes;

  void operator()(const float* key) const {
    const char* k = reinterpret_cast<const char*>(key);
    const char* v = reinterpret_cast<const char*>(key + value_offset);
    for (int64_t at = 0; at < bytes; at += 64) {
      _mm_prefetch(k + at, _MM_HINT_T0);
      _mm_prefetch(v + at, _MM_HINT_T1);
    }
  }
};

constexpr int64_t kFetchAhead = 8;  // positions

// scores[i][j] = <query i, key j>; `keys` is readable for whole tiles of four.
inline void score(const float* const* query, int64_t queries, const float* const* keys,
                  int64_t count, int64_t dim, const Fetch& fetch, float* scores) {
  for (int64_t j = 0; j < count && j < kFetchAhead; ++j) fetch(keys[j]);
  for (int64_t j = 0; j < count; j += 4) {
    for (int64_t t = j + kFetchAhead; t < j + kFetchAhead + 4 && t < count; ++t) fetch(keys[t]);
    int64_t i = 0;
    for (; i + 3 <= queries; i += 3)
      score_tile<3>(query + i, keys + j, dim, scores + i * kSpan + j);
    for (; i < queries; ++i) score_tile<1>(query + i, keys + j, dim, scores + i * kSpan + j);
  }
}

// Replaces scores [low, high) by exp(score - maximum), the others below `count` by zero.
inline void soften(float* scores, int64_t low, int64_t high, int64_t count, float& maximum,
                   float& total) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  if (high < 0) high = 0;
  for (int64_t j = 0; j < low && j < padded; ++j) scores[j] = kNever;
  for (int64_t j = high; j < padded; ++j) scores[j] = kNever;
  Vec top = fill(kNever);
  for (int64_t j = 0; j < padded; j += kLanes) top = max(top, load(scores + j));
  maximum = largest(top);
  const Vec shift = fill(maximum == kNever ? 0.0f : maximum);
  Vec all = zero();
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = exp(sub(load(scores + j), shift));
    store(scores + j, weight);
    all = add(all, weight);
  }
  total = sum(all);
}

// values[q][0 .. D vectors) = sum over positions of weight times value.
template <int Q, int D>
void weigh_tile(const float* weights, const float* const* values, int64_t offset, int64_t count,
                float* out, int64_t dim) {
  Vec total[Q][D];
  for (int q = 0; q < Q; ++q)
    for (int d = 0; d < D; ++d) total[q][d] = zero();
  for (int64_t j = 0; j < count; ++j) {
    const float* value = values[j] + offset;
    Vec x[D];
    for (int d = 0; d < D; ++d) x[d] = load(value + d * kLanes);
    for (int q = 0; q < Q; ++q) {
      const Vec weight = fill(weights[q * kSpan + j]);
      for (int d = 0; d < D; ++d) total[q][d] = fma(weight, x[d], total[q][d]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int d = 0; d < D; ++d) store(out + q * dim + d * kLanes, total[q][d]);
}

template <int Q>
void weigh_queries(const float* weights, const float* const* keys, int64_t offset, int64_t count,
                   int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    weigh_tile<Q, 4>(weights, keys, offset + d, count, out + d, dim);
  for (; d + kLanes <= dim; d += kLanes)
    weigh_tile<Q, 1>(weights, keys, offset + d, count, out + d, dim);
  for (; d < dim; ++d) {
    for (int q = 0; q < Q; ++q) {
      float total = 0;
      for (int64_t j = 0; j < count; ++j) total += weights[q * kSpan + j] * keys[j][offset + d];
      out[q * dim + d] = total;
    }
  }
}

// Values lie `offset` floats behind their keys; out [queries, dim].
inline void weigh(const float* weights, int64_t queries, const float* const* keys, int64_t offset,
                  int64_t count, int64_t dim, float* out) {
  int64_t i = 0;
  for (; i + 3 <= queries; i += 3)
    weigh_queries<3>(weights + i * kSpan, keys, offset, count, dim, out + i * dim);
  for (; i < queries; ++i)
    weigh_queries<1>(weights + i * kSpan, keys, offset, count, dim, out + i * dim);
}

// Folds the next span into the state of those before it. A span that a query does not see leaves
// its state as it is.
inline void merge(const Partial& span, int64_t queries, int64_t dim, const Partial& state) {
  for (int64_t i = 0; i < queries; ++i) {
    if (span.sum[i] == 0.0f) continue;
    const float top = std::fmax(state.maximum[i], span.maximum[i]);
    const float keep = std::exp(state.maximum[i] - top), take = std::exp(span.maximum[i] - top);
    state.maximum[i] = top;
    state.sum[i] = state.sum[i] * keep + span.sum[i] * take;
    float* to = state.values + i * dim;
    const float* from = span.values + i * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = to[d] * keep + from[d] * take;
  }
}

}  // namespace blockllm
