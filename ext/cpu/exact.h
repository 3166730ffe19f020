// Attention of a block in float32: a way of attend.cpp.
#pragma once
#include "attention.h"
#include "sweep.h"
#include "turned.h"

namespace blockllm {

template <class T>
struct Exact : InPartials<Exact<T>> {
  const Attention<T> a;

  explicit Exact(const Attention<T>& made) : a(made) {}

  int64_t width() const { return a.call.dim; }
  // Floats of the queries of a block and head, ready.
  int64_t query_floats(int64_t queries) const { return queries * a.call.dim; }

  void prepare(const Reach& reach, int64_t head, float* to) const {
    for (int64_t i = 0; i < a.queries_of(reach); ++i)
      a.prepare_query(reach, head, i, to + i * a.call.dim);
  }

  // The partial results of a piece's heads.
  void attend(const Piece& piece, const float* query, float* to) const {
    a.queries_of(piece.reach) < kQueriesToTurn ? attend_few(piece, query, to)
                                               : attend_many(piece, query, to);
  }

 private:
  void attend_few(const Piece& piece, const float* query, float* to) const {
    const int64_t queries = a.queries_of(piece.reach), heads = piece.heads.count;
    const int64_t apart = this->floats(queries);
    const Keys<T> keys = a.sweep(piece, kSweepAhead);
    const Seen seen = a.seen(piece.reach, piece.span);
    const int64_t first = seen.begin(0) / kWeighed * kWeighed;
    float* scores = scratch<kScores>(heads * queries * kSpan);
    score_heads(query, queries, keys, heads, first, scores);
    for (int64_t h = 0; h < heads; ++h)
      soften_all(seen, queries, keys.count, scores + h * queries * kSpan, to + h * apart);
    weigh_heads(scores, queries, keys, heads, seen, first, Partial(to, queries).values, apart);
  }

  void attend_many(const Piece& piece, const float* query, float* to) const {
    const int64_t queries = a.queries_of(piece.reach), heads = piece.heads.count;
    const Seen seen = a.seen(piece.reach, piece.span);
    float* scores = scratch<kScores>(queries * kSpan);
    int64_t bytes = heads * a.call.dim * sizeof(typename T::Element);  // of all heads, in one sweep
    for (int64_t h = 0; h < heads; ++h, bytes = 0) {
      const Keys<T> keys = a.keys(piece.reach, piece.heads.first + h, piece.span);
      float* own = to + h * this->floats(queries);
      score_turned(query + h * query_floats(queries), queries, keys, seen, bytes, scores);
      soften_all(seen, queries, keys.count, scores, own);
      weigh(scores, queries, keys, {seen, {0, keys.count}, true}, Partial(own, queries).values);
    }
  }

  // The softmax of each query's scores.
  static void soften_all(const Seen& seen, int64_t queries, int64_t count, float* scores,
                         float* to) {
    const Partial out(to, queries);
    for (int64_t i = 0; i < queries; ++i)
      soften(scores + i * kSpan, seen.begin(i), seen.end(i), count, out.maximum[i], out.sum[i]);
  }
};

}  // namespace blockllm
