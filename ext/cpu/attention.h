// One call of attention: where its rows stand and what they see, where their keys and values lie in
// the pages, and how queries and keys are made ready.
#pragma once
#include <algorithm>

#include "chunk.h"
#include "heads.h"
#include "span.h"

namespace blockllm {

// Which rows a block has, and which spans of their context it reads.
struct Reach {
  int64_t first, last;           // rows
  int64_t span_begin, span_end;  // spans
};

// What is computed at once: one span of some kv heads of a block.
struct Piece {
  const Reach& reach;
  Rows heads;
  int64_t span;
};

template <class T>
struct Attention {
  using Element = typename T::Element;

  const AttendCall& call;
  int64_t group;  // query heads per kv head

  explicit Attention(const AttendCall& made) : call(made), group(made.heads / made.kv_heads) {}

  int64_t position(int64_t row) const { return call.plan->row_position[row]; }
  int64_t lowest(int64_t row) const {
    return call.window > 0 ? std::max<int64_t>(0, position(row) - call.window + 1) : 0;
  }
  const int32_t* pages(int64_t row) const {
    const Plan& plan = *call.plan;
    return plan.tables +
           (plan.row_sequence[row] * plan.layers + call.layer) * plan.pages_per_sequence;
  }
  // Elements of the keys of a page: how far behind them their values lie.
  int64_t page_size() const { return call.page * call.kv_heads * call.dim; }
  Element* key(const int32_t* pages, int64_t position, int64_t head) const {
    const int64_t slot = position % call.page * call.kv_heads + head;
    return static_cast<Element*>(call.cache) + 2 * page_size() * pages[position / call.page] +
           slot * call.dim;
  }
  Reach reach(int64_t block) const {
    const int32_t* edge = call.plan->block_first + block;
    return {edge[0], edge[1], lowest(edge[0]) / kSpan, position(edge[1] - 1) / kSpan + 1};
  }
  // Of a block and a kv head: how many queries, the row of each, and where it lies in [rows, heads,
  // dim].
  int64_t queries_of(const Reach& r) const { return (r.last - r.first) * group; }
  int64_t row_of(const Reach& r, int64_t query) const { return r.first + query / group; }
  int64_t place(const Reach& r, int64_t head, int64_t query) const {
    return (row_of(r, query) * call.heads + head * group + query % group) * call.dim;
  }
  // The keys of a span, as many as the last row of a block sees: the others see no more.
  Keys<T> keys(const Reach& r, int64_t head, int64_t span) const {
    const int64_t begin = span * kSpan, left = position(r.last - 1) + 1 - begin;
    const int64_t known = std::min(kSpan + kAheadMost, left);
    const int32_t* of = pages(r.first);
    auto** at = scratch<kKeys, const Element*>(kSpan + kAheadMost);
    int64_t done = 0;
    while (done < known) {  // page by page
      const Element* next = key(of, begin + done, head);
      const int64_t end = std::min(known, done + call.page - (begin + done) % call.page);
      for (; done < end; ++done) {
        at[done] = next;
        next += call.kv_heads * call.dim;
      }
    }
    for (; done < kSpan + kAheadMost; ++done) at[done] = at[known - 1];
    return {at, std::min(kSpan, left), call.dim, page_size()};
  }

  // What a block's queries see of a span.
  Seen seen(const Reach& r, int64_t span) const {
    const int64_t begin = span * kSpan, first = position(r.first) + 1 - begin;
    const int64_t none = std::numeric_limits<int32_t>::min();
    const int64_t low = call.window > 0 ? first - call.window : none;
    return {low, first, group, std::min(kSpan, position(r.last - 1) + 1 - begin)};
  }

  // A query of a block, normalized, rotated and scaled.
  void prepare_query(const Reach& r, int64_t head, int64_t query, float* to) const {
    const int64_t row = row_of(r, query);
    const Norm norm = norm_of(call.q_norm, row);
    const float* from = call.q + place(r, head, query);
    prepare_head(norm, call.rotary, position(row), from, call.dim, to);
    for (int64_t i = 0; i < call.dim; ++i) to[i] *= static_cast<float>(call.scale);
  }

  // Normalizes and rotates a row's keys; writes them and its values into their pages.
  void append(int64_t row) const {
    const int64_t dim = call.dim;
    const Norm norm = norm_of(call.k_norm, row);
    const int32_t* of = pages(row);
    float* ready = scratch<kHead>(dim);
    for (int64_t h = 0; h < call.kv_heads; ++h) {
      const int64_t at = (row * call.kv_heads + h) * dim;
      Element* to = key(of, position(row), h);
      prepare_head(norm, call.rotary, position(row), call.k + at, dim, ready);
      T::write(ready, dim, to);
      T::write(call.v + at, dim, to + page_size());
    }
  }
};

}  // namespace blockllm
