// Scores of many queries over one span: keys are turned round once, so that a vector holds one
// element of several positions and nothing has to be summed across lanes.
//
// The sums are those of sweep.h to the last bit: element d belongs to the chain of lane d % kLanes,
// and chains are added as `sums` adds lanes.
#pragma once
#include "span.h"
#include "words.h"

namespace blockllm {

// From so many queries on, turning pays.
constexpr int64_t kQueriesToTurn = 12;
constexpr int kTurnedVectors = 2;
constexpr int64_t kKeysAtOnce = kLanes == 16 ? 16 : 4;
constexpr int64_t kTurnedPositions = kTurnedVectors * kLanes;

// Turns the elements [d, dim) of four keys.
template <class T>
void turn_quad(const typename T::Element* const* at, int64_t d, int64_t dim, float* turned) {
  for (; d + 4 <= dim; d += 4) {
    __m128 a = T::four(at[0] + d), b = T::four(at[1] + d);
    __m128 c = T::four(at[2] + d), e = T::four(at[3] + d);
    _MM_TRANSPOSE4_PS(a, b, c, e);
    float* to = turned + d * kTurnedPositions;
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + kTurnedPositions, b);
    _mm_storeu_ps(to + 2 * kTurnedPositions, c);
    _mm_storeu_ps(to + 3 * kTurnedPositions, e);
  }
  for (; d < dim; ++d)
    for (int i = 0; i < 4; ++i) turned[d * kTurnedPositions + i] = T::value(at[i][d]);
}

// Turns the first elements of 16 keys, in squares; returns how many.
template <class T>
int64_t turn_squares(const typename T::Element* const* at, int64_t dim, float* turned) {
  int64_t d = 0;
#if defined(__AVX512F__)
  for (; d + 16 <= dim; d += 16) {
    __m512i x[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_castps_si512(T::row(at[i] + d));
    turn_words(x);
    for (int i = 0; i < 16; ++i)
      store(turned + (d + i) * kTurnedPositions, _mm512_castsi512_ps(x[i]));
  }
#endif
  return d;
}

// turned[tile][d][j] = element d of the tile's key j, tiles of kTurnedPositions.
template <class T>
void turn(const Keys<T>& keys, int64_t fetched, float* turned) {
  fetch(keys, 0, kKeysAtOnce, fetched);
  for (int64_t j = 0; j < keys.count; j += kKeysAtOnce) {
    fetch(keys, j + kKeysAtOnce, j + 2 * kKeysAtOnce, fetched);
    const int64_t within = j % kTurnedPositions;
    float* tile = turned + (j - within) * keys.dim + within;
    const int64_t done = turn_squares<T>(keys.at + j, keys.dim, tile);
    for (int64_t i = 0; i < kKeysAtOnce && done < keys.dim; i += 4)
      turn_quad<T>(keys.at + j + i, done, keys.dim, tile + i);
  }
}

template <int Q>
struct Scores {
  Vec at[Q][kTurnedVectors];
};

template <int Q>
[[gnu::always_inline]] inline Scores<Q> operator+(const Scores<Q>& a, const Scores<Q>& b) {
  Scores<Q> all;
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int p = 0; p < kTurnedVectors; ++p) all.at[q][p] = add(a.at[q][p], b.at[q][p]);
  return all;
}

// The chain of one lane: elements lane, lane + kLanes, ... of whole vectors.
template <int Q>
[[gnu::always_inline]] inline Scores<Q> chain(const float* query, const float* turned,
                                              int64_t lane, int64_t dim) {
  const int64_t whole = dim / kLanes * kLanes;
  Scores<Q> total;
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int p = 0; p < kTurnedVectors; ++p) total.at[q][p] = zero();
#pragma GCC unroll 4  // without it the loop costs as much as the products
  for (int64_t d = lane; d < whole; d += kLanes) {
    Vec key[kTurnedVectors];
#pragma GCC unroll 2
    for (int p = 0; p < kTurnedVectors; ++p)
      key[p] = load(turned + d * kTurnedPositions + p * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const Vec x = fill(query[q * dim + d]);
#pragma GCC unroll 2
      for (int p = 0; p < kTurnedVectors; ++p) total.at[q][p] = fma(x, key[p], total.at[q][p]);
    }
  }
  return total;
}

// The sum of `Count` of eight leaves from `leaf` on, two by two; a leaf is what `fold` leaves of
// the lanes.
template <int Q, int Count>
[[gnu::always_inline]] inline Scores<Q> tree(const float* query, const float* turned,
                                             int64_t leaf, int64_t dim) {
  if constexpr (Count > 1) {
    const Scores<Q> first = tree<Q, Count / 2>(query, turned, leaf, dim);
    return first + tree<Q, Count / 2>(query, turned, leaf + Count / 2, dim);
  } else if constexpr (kLanes == 16) {
    const Scores<Q> low = chain<Q>(query, turned, leaf, dim);
    return low + chain<Q>(query, turned, leaf + 8, dim);
  } else {
    return chain<Q>(query, turned, leaf, dim);
  }
}

template <int Q>
void score_turned_tile(const float* query, const float* turned, int64_t dim, float* scores) {
  const int64_t whole = dim / kLanes * kLanes;
  Scores<Q> total = tree<Q, 8>(query, turned, 0, dim);
  for (int q = 0; q < Q; ++q) {
    for (int p = 0; p < kTurnedVectors; ++p) {
      Vec score = total.at[q][p];
      for (int64_t d = whole; d < dim; ++d) {
        const Vec key = load(turned + d * kTurnedPositions + p * kLanes);
        score = add(score, mul(fill(query[q * dim + d]), key));
      }
      store(scores + q * kSpan + p * kLanes, score);
    }
  }
}

// scores[i][j] = <query i, key j> where a query of three sees j; elsewhere anything.
template <class T>
void score_turned(const float* query, int64_t queries, const Keys<T>& keys, const Seen& seen,
                  int64_t fetched, float* scores) {
  float* turned = scratch<kTurned>(keys.dim * kSpan);
  turn(keys, fetched, turned);
  for (int64_t j = 0; j < keys.count; j += kTurnedPositions) {
    const float* tile = turned + j * keys.dim;
    int64_t i = 0;
    for (; i + 3 <= queries; i += 3) {
      if (seen.end(i + 2) > j && seen.begin(i) < j + kTurnedPositions)
        score_turned_tile<3>(query + i * keys.dim, tile, keys.dim, scores + i * kSpan + j);
    }
    for (; i < queries; ++i)
      score_turned_tile<1>(query + i * keys.dim, tile, keys.dim, scores + i * kSpan + j);
  }
}

}  // namespace blockllm
