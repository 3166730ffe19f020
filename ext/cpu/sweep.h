// Attention of few queries over one span, several heads of it together. Little is computed with
// what is read, so memory is what counts: heads lie side by side at each position, and keys, then
// values, are read in one sweep, while those that come next are fetched.
#pragma once
#include "span.h"

namespace blockllm {

// Positions that are scored, and weighed, at a time, and how far ahead is fetched.
constexpr int64_t kScored = 4, kWeighed = 16;
constexpr Ahead kSweepAhead{12, 8};

// What the elements [first, dim) of a tile add to its scores.
template <class T>
[[gnu::noinline]] void score_rest(const float* query, int queries, const Keys<T>& keys, int64_t d,
                                  int64_t first, float* scores) {
  for (int q = 0; q < queries; ++q)
    for (int64_t t = d; t < keys.dim; ++t)
      for (int64_t j = first; j < first + kScored; ++j)
        scores[q * kSpan + j] += query[q * keys.dim + t] * T::value(keys.key(j)[t]);
}

// Scores of Q queries at kScored positions.
template <class T, int Q>
void score_tile(const float* query, const Keys<T>& keys, int64_t first, float* scores) {
  const int64_t dim = keys.dim;
  const typename T::Element *at[kScored], *soon[kScored];
#pragma GCC unroll 4
  for (int j = 0; j < kScored; ++j) {
    at[j] = keys.key(first + j);
    soon[j] = keys.soon_key(first + j);
  }
  Vec total[Q][kScored];
#pragma GCC unroll 3
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int j = 0; j < kScored; ++j) total[q][j] = zero();
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec x[Q];
#pragma GCC unroll 3
    for (int q = 0; q < Q; ++q) x[q] = load(query + q * dim + d);
#pragma GCC unroll 4
    for (int j = 0; j < kScored; ++j) {
      fetch_line<kLanes>(soon[j] + d);
      const Vec key = T::row(at[j] + d);
#pragma GCC unroll 3
      for (int q = 0; q < Q; ++q) total[q][j] = fma(x[q], key, total[q][j]);
    }
  }
#pragma GCC unroll 3
  for (int q = 0; q < Q; ++q)
    _mm_storeu_ps(scores + q * kSpan + first,
                  sums(total[q][0], total[q][1], total[q][2], total[q][3]));
  if (d < dim) score_rest<T>(query, Q, keys, d, first, scores);
}

template <class T>
void score_queries(const float* query, int64_t queries, const Keys<T>& keys, int64_t first,
                   float* scores) {
  int64_t i = 0;
  for (; i + 3 <= queries; i += 3)
    score_tile<T, 3>(query + i * keys.dim, keys, first, scores + i * kSpan);
  for (; i < queries; ++i)
    score_tile<T, 1>(query + i * keys.dim, keys, first, scores + i * kSpan);
}

// scores[head][i][j] = <query i, key j> from position `first` on, a multiple of kScored.
template <class T>
void score_heads(const float* query, int64_t queries, const Keys<T>& keys, int64_t heads,
                 int64_t first, float* scores) {
  for (int64_t j = first; j < keys.count; j += kScored)
    for (int64_t h = 0; h < heads; ++h)
      score_queries(query + h * queries * keys.dim, queries, keys.behind(h), j,
                    scores + h * queries * kSpan);
}

// The values of each head weighted, into out[head], `apart` floats from each other.
template <class T>
void weigh_heads(const float* weights, int64_t queries, const Keys<T>& keys, int64_t heads,
                 const Seen& seen, int64_t first, float* out, int64_t apart) {
  for (int64_t j = first; j < keys.count; j += kWeighed) {
    const Positions some{j, std::min(j + kWeighed, keys.count)};
    for (int64_t h = 0; h < heads; ++h)
      weigh<T, true>(weights + h * queries * kSpan, queries, keys.behind(h),
                     {seen, some, j == first}, out + h * apart);
  }
}

}  // namespace blockllm
