// Attention of one block and kv head in float32: a way of attend.cpp.
#pragma once
#include "attention.h"
#include "turned.h"

namespace blockllm {

template <class T>
struct Exact {
  const Attention<T> a;

  // Floats of the queries of a block and head, ready, and of a partial result.
  int64_t query_floats(int64_t queries) const { return queries * a.call.dim; }
  int64_t floats(int64_t queries) const { return Partial::floats(queries, a.call.dim); }

  void prepare(const Reach& reach, int64_t head, float* to) const {
    for (int64_t i = 0; i < a.queries_of(reach); ++i)
      a.prepare_query(reach, head, i, to + i * a.call.dim);
  }

  // The partial result of a piece.
  void attend(const Piece& piece, const float* query, float* to) const {
    const Reach& reach = piece.reach;
    const Keys<T> keys = a.keys(reach, piece.head, piece.span);
    const Seen seen = a.seen(reach, piece.span);
    const int64_t queries = a.queries_of(reach);
    const Partial out(to, queries);
    float* scores = scratch<kScores>(queries * kSpan);
    const int64_t bytes = piece.fetched_heads * a.call.dim * sizeof(typename T::Element);
    if (queries < kQueriesToTurn) {
      score(query, queries, keys, bytes, scores);
    } else {
      score_turned(query, queries, keys, seen, bytes, scores);
    }
    for (int64_t i = 0; i < queries; ++i) {
      float* own = scores + i * kSpan;
      soften(own, seen.begin(i), seen.end(i), keys.count, out.maximum[i], out.sum[i]);
    }
    weigh(scores, queries, keys, seen, out.values);
  }

  // The same, folded into the state of the spans before it.
  void go_on(const Piece& piece, const float* query, float* state) const {
    const int64_t queries = a.queries_of(piece.reach);
    float* span = scratch<kSpanResult>(floats(queries));
    attend(piece, query, span);
    fold(span, queries, state);
  }

  void fold(float* span, int64_t queries, float* state) const {
    merge(Partial(span, queries), queries, a.call.dim, Partial(state, queries));
  }

  void write(const Reach& reach, int64_t head, float* all) const {
    const int64_t dim = a.call.dim, queries = a.queries_of(reach);
    const Partial state(all, queries);
    for (int64_t i = 0; i < queries; ++i) {
      float* out = a.call.out + a.place(reach, head, i);
      const float inverse = 1.0f / state.sum[i];
      for (int64_t d = 0; d < dim; ++d) out[d] = state.values[i * dim + d] * inverse;
    }
  }
};

}  // namespace blockllm
