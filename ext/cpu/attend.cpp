// Attention over pages: queries and keys are normalized and rotated, keys and values written into
// their pages, then each block of rows attends to its sequence's pages in place.
//
// A context is read in spans of kSpan positions that begin at multiples of kSpan. Each span gives
// its own maximum, sum and weighted values; spans are merged in order. So a row's result does not
// depend on the rows that share its block, nor on whether spans were computed by one thread or by
// several.
#include <algorithm>
#include <cmath>
#include <limits>

#include "exports.h"
#include "heads.h"
#include "turned.h"

namespace blockllm {
namespace {

constexpr int64_t kRowsInline = 4;  // up to so many rows are prepared by the caller itself
constexpr int64_t kRowsPerTask = 8;
constexpr int64_t kTasksPerThread = 4;  // fewer blocks than that are split by heads, then by spans

// Which rows and which spans of their context one block reads.
struct Reach {
  int64_t first, last;           // rows
  int64_t span_begin, span_end;  // spans
};

template <class T>
struct Attention {
  using Element = typename T::Element;

  const AttendCall& call;
  int64_t group;   // query heads per kv head
  float* queries;  // [rows, heads, dim], ready

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
  int64_t queries_of(const Reach& r) const { return (r.last - r.first) * group; }
};

template <class T>
void prepare_row(const Attention<T>& a, int64_t row) {
  const AttendCall& call = a.call;
  const int64_t dim = call.dim, position = a.position(row);
  const Norm q_norm = norm_of(call.q_norm, row), k_norm = norm_of(call.k_norm, row);
  for (int64_t h = 0; h < call.heads; ++h) {
    float* to = a.queries + (row * call.heads + h) * dim;
    prepare_head(q_norm, call.rotary, position, call.q + (row * call.heads + h) * dim, dim, to);
    for (int64_t i = 0; i < dim; ++i) to[i] *= static_cast<float>(call.scale);
  }
  const int32_t* pages = a.pages(row);
  float* ready = scratch<kHead>(dim);
  for (int64_t h = 0; h < call.kv_heads; ++h) {
    const int64_t at = (row * call.kv_heads + h) * dim;
    auto* key = a.key(pages, position, h);
    prepare_head(k_norm, call.rotary, position, call.k + at, dim, ready);
    T::write(ready, dim, key);
    T::write(call.v + at, dim, key + a.page_size());
  }
}

template <class T>
void prepare_rows(Pool* pool, const Attention<T>& a) {
  const int64_t rows = a.call.plan->rows;
  if (rows <= kRowsInline) {
    for (int64_t row = 0; row < rows; ++row) prepare_row(a, row);
    return;
  }
  pool->run((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t last = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < last; ++row) prepare_row(a, row);
  });
}

// The partial result of one block, kv head and span. Meanwhile memory of `fetched_heads` heads from
// this one on is fetched: a task that goes through all heads has its pages read in one sweep.
template <class T>
void attend_span(const Attention<T>& a, const Reach& reach, int64_t head, int64_t index,
                 int64_t fetched_heads, const Partial& out) {
  const AttendCall& call = a.call;
  const int64_t begin = index * kSpan;
  const int64_t count = std::min(kSpan, a.position(reach.last - 1) + 1 - begin);
  const int32_t* pages = a.pages(reach.first);
  auto** at = scratch<kKeys, const typename T::Element*>(kSpan + 4);
  for (int64_t i = 0; i < count; ++i) at[i] = a.key(pages, begin + i, head);
  for (int64_t i = count; i < count + 4; ++i) at[i] = at[count - 1];  // whole quads
  const Keys<T> keys{at, count, call.dim, a.page_size()};
  const int64_t queries = a.queries_of(reach);
  const float** query = scratch<kQueryRows, const float*>(queries);
  float* scores = scratch<kScores>(queries * kSpan);
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t row = reach.first + i / a.group;
    query[i] = a.queries + (row * call.heads + head * a.group + i % a.group) * call.dim;
  }
  const int64_t bytes = fetched_heads * call.dim * sizeof(typename T::Element);
  if (queries < kQueriesToTurn) {
    score(query, queries, keys, bytes, scores);
  } else {
    score_turned(query, queries, keys, bytes, scores);
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t row = reach.first + i / a.group;
    const int64_t low = std::max<int64_t>(0, a.lowest(row) - begin);
    const int64_t high = std::min(count, a.position(row) + 1 - begin);
    soften(scores + i * kSpan, low, high, count, out.maximum[i], out.sum[i]);
  }
  weigh(scores, queries, keys, out.values);
}

template <class T>
void write_out(const Attention<T>& a, const Reach& reach, int64_t head, const Partial& state) {
  const int64_t dim = a.call.dim;
  for (int64_t i = 0; i < a.queries_of(reach); ++i) {
    const int64_t row = reach.first + i / a.group;
    float* out = a.call.out + (row * a.call.heads + head * a.group + i % a.group) * dim;
    const float inverse = 1.0f / state.sum[i];
    for (int64_t d = 0; d < dim; ++d) out[d] = state.values[i * dim + d] * inverse;
  }
}

// Attends heads [first, last) of one block, span by span.
template <class T>
void attend_block(const Attention<T>& a, int64_t block, int64_t first, int64_t last) {
  const Reach reach = a.reach(block);
  const int64_t queries = a.queries_of(reach), floats = Partial::floats(queries, a.call.dim);
  float* states = scratch<kState>((last - first) * floats);
  const Partial span(scratch<kPartial>(floats), queries);
  for (int64_t i = reach.span_begin; i < reach.span_end; ++i) {
    for (int64_t head = first; head < last; ++head) {
      const Partial state(states + (head - first) * floats, queries);
      const bool opens = i == reach.span_begin;
      attend_span(a, reach, head, i, head == first ? last - first : 0, opens ? state : span);
      if (!opens) merge(span, queries, a.call.dim, state);
    }
  }
  for (int64_t head = first; head < last; ++head)
    write_out(a, reach, head, Partial(states + (head - first) * floats, queries));
}

// The same with the spans of every block and head as tasks of their own, merged afterwards.
template <class T>
void attend_split(Pool* pool, const Attention<T>& a, int64_t spans) {
  const int64_t heads = a.call.kv_heads, dim = a.call.dim, blocks = a.call.plan->blocks;
  int64_t queries = 0;
  for (int64_t b = 0; b < blocks; ++b) queries = std::max(queries, a.queries_of(a.reach(b)));
  const int64_t floats = Partial::floats(queries, dim);
  float* partials = scratch<kPartial>(blocks * heads * spans * floats);
  pool->run(blocks * heads * spans, [&](int64_t task) {
    const Reach reach = a.reach(task / spans / heads);
    const int64_t index = reach.span_begin + task % spans;
    if (index >= reach.span_end) return;
    const Partial own(partials + task * floats, a.queries_of(reach));
    attend_span(a, reach, task / spans % heads, index, 1, own);
  });
  pool->run(blocks * heads, [&](int64_t task) {
    const Reach reach = a.reach(task / heads);
    const int64_t own = a.queries_of(reach);
    const Partial state(partials + task * spans * floats, own);
    for (int64_t i = 1; i < reach.span_end - reach.span_begin; ++i)
      merge(Partial(partials + (task * spans + i) * floats, own), own, dim, state);
    write_out(a, reach, task % heads, state);
  });
}

template <class T>
void attend(Pool* pool, const AttendCall& call) {
  const Plan& plan = *call.plan;
  const Attention<T> a{call, call.heads / call.kv_heads,
                       scratch<kQueries>(plan.rows * call.heads * call.dim)};
  prepare_rows(pool, a);
  const int64_t heads = call.kv_heads, enough = kTasksPerThread * pool->threads();
  if (plan.blocks >= enough || pool->threads() == 1)
    return pool->run(plan.blocks, [&](int64_t block) { attend_block(a, block, 0, heads); });
  int64_t spans = 1;
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const Reach reach = a.reach(b);
    spans = std::max(spans, reach.span_end - reach.span_begin);
  }
  if (spans > 1 && plan.blocks * heads < enough) return attend_split(pool, a, spans);
  pool->run(plan.blocks * heads,
            [&](int64_t task) { attend_block(a, task / heads, task % heads, task % heads + 1); });
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_attend(Pool* pool, const AttendCall* call) {
  call->storage == Storage::kBF16 ? attend<BFloat16>(pool, *call) : attend<Float32>(pool, *call);
}
