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

// The block that is attended as the i-th one. A thread has blocks that lie together, as it has rows
// where projections share them out, and begins with the last: of a prompt, later blocks see more
// and take longer.
inline int64_t block_of(int64_t i, int64_t blocks, int64_t threads) {
  const Rows own = part(blocks, threads, part_with(blocks, threads, i));
  return 2 * own.first + own.count - 1 - i;
}

// What is computed at once: one span of some kv heads of a block.
struct Piece {
  const Reach& reach;
  Rows heads;
  int64_t span;
  int64_t then = -1;  // the block whose keys are read behind the last span, if any
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
    auto** at = scratch<kKeys, const Element*>(kSpan);
    const int64_t count = find_keys(r, head, span, kSpan, at);
    std::fill(at + count, at + kSpan, at[count - 1]);
    return {at, count, call.dim, page_size()};
  }

  // The same of a piece whose heads are swept over: what will be read is fetched so far ahead. It
  // reads keys, then values, then the keys of the next span, or block.
  Keys<T> sweep(const Piece& piece, const Ahead& ahead) const {
    Keys<T> keys = this->keys(piece.reach, piece.heads.first, piece.span);
    auto** next = scratch<kNextKeys, const Element*>(kSpan);
    int64_t known = 0;
    if (piece.span + 1 < piece.reach.span_end) {
      known = find_keys(piece.reach, piece.heads.first, piece.span + 1, ahead.values, next);
    } else if (piece.then >= 0) {
      const Reach then = reach(piece.then);
      known = find_keys(then, piece.heads.first, then.span_begin, ahead.values, next);
    }
    const int64_t count = keys.count;
    const int64_t read = std::min(kSpan, ceil_div(count, kReadAtOnce) * kReadAtOnce);
    auto** at_key = scratch<kSoon, const Element*>(2 * kSpan);
    auto** at_value = at_key + kSpan;
    int64_t j = 0;
    for (; j < count - ahead.keys; ++j) at_key[j] = keys.at[j + ahead.keys];
    for (; j < read; ++j)
      at_key[j] = keys.at[std::min(j + ahead.keys - count, kSpan - 1)] + page_size();
    for (j = 0; j < count - ahead.values; ++j)
      at_value[j] = keys.at[j + ahead.values] + page_size();
    for (; j < read; ++j) {
      const int64_t behind = j + ahead.values - count;
      at_value[j] = behind < known ? next[behind] : keys.at[j];
    }
    keys.soon_at_key = at_key;
    keys.soon_at_value = at_value;
    return keys;
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

 private:
  // The first keys of a span that the last row of a block sees, at most so many; how many.
  int64_t find_keys(const Reach& r, int64_t head, int64_t span, int64_t most,
                    const Element** at) const {
    const int64_t begin = span * kSpan, count = std::min(most, position(r.last - 1) + 1 - begin);
    const int32_t* of = pages(r.first);
    for (int64_t done = 0; done < count;) {  // page by page
      const Element* next = key(of, begin + done, head);
      const int64_t end = std::min(count, done + call.page - (begin + done) % call.page);
      for (; done < end; ++done) {
        at[done] = next;
        next += call.kv_heads * call.dim;
      }
    }
    return count;
  }
};

// What those ways of attend.cpp have in common whose results are Partials with rows of `width()`.
template <class Way>
struct InPartials {
  int64_t floats(int64_t queries) const { return Partial::floats(queries, way().width()); }

  // The partial results of a piece's heads, folded into the states of the spans before it.
  void go_on(const Piece& piece, const float* query, float* states) const {
    const int64_t queries = way().a.queries_of(piece.reach), apart = floats(queries);
    float* span = scratch<kSpanResult>(piece.heads.count * apart);
    way().attend(piece, query, span);
    for (int64_t h = 0; h < piece.heads.count; ++h)
      fold(span + h * apart, queries, states + h * apart);
  }

  void fold(float* span, int64_t queries, float* state) const {
    merge(Partial(span, queries), queries, way().width(), Partial(state, queries));
  }

  void write(const Reach& reach, int64_t head, float* all) const {
    const auto& a = way().a;
    const int64_t dim = a.call.dim, queries = a.queries_of(reach);
    const Partial state(all, queries);
    for (int64_t i = 0; i < queries; ++i) {
      float* out = a.call.out + a.place(reach, head, i);
      const float inverse = 1.0f / state.sum[i];
      for (int64_t d = 0; d < dim; ++d) out[d] = state.values[i * way().width() + d] * inverse;
    }
  }

 private:
  const Way& way() const { return static_cast<const Way&>(*this); }
};

}  // namespace blockllm
