// Attention over pages: queries and keys are normalized and rotated, keys and values written into
// their pages, then each block of rows attends to its sequence's pages in place.
//
// A context is read in spans of kSpan positions that begin at multiples of kSpan. Each span gives
// its own maximum, sum and weighted values; spans are merged in order. So a row's result does not
// depend on the rows that share its block, nor on whether spans were computed by one thread or by
// several.
#include "exact.h"
#include "exports.h"
#include "rounded.h"

namespace blockllm {
namespace {

constexpr int64_t kRowsInline = 4;  // up to so many rows are appended by the caller itself
constexpr int64_t kFloatsInline = 8192;  // and up to so many of partial results merged
constexpr int64_t kQueriesInline = 16;   // so many of a block are made ready anew for each span
constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kTasksPerThread = 4;  // fewer blocks than that are split by heads, then by spans

// Calls body(block, head) for every block and kv head.
template <class Way, class Body>
void each_head(Pool* pool, const Way& way, const Body& body) {
  const int64_t heads = way.a.call.kv_heads, blocks = way.a.call.plan->blocks;
  pool->run(blocks * heads, [&](int64_t task) {
    body(block_of(task / heads, blocks, pool->threads()), task % heads);
  });
}

template <class Way>
void append(Pool* pool, const Way& way) {
  const int64_t rows = way.a.call.plan->rows;
  const int64_t at_once = rows <= kRowsInline ? kRowsInline : kRowsPerTask;
  pool->run((rows + at_once - 1) / at_once, [&](int64_t task) {
    const int64_t last = std::min(rows, (task + 1) * at_once);
    for (int64_t row = task * at_once; row < last; ++row) way.a.append(row);
  });
}

// Attends heads [first, last) of one block, span by span.
template <class Way>
void attend_block(const Way& way, int64_t block, int64_t first, int64_t last, int64_t then = -1) {
  const Reach reach = way.a.reach(block);
  const int64_t queries = way.a.queries_of(reach);
  const int64_t ready = way.query_floats(queries), floats = way.floats(queries);
  float* query = scratch<kQueries>((last - first) * ready);
  float* states = scratch<kState>((last - first) * floats);
  for (int64_t head = first; head < last; ++head)
    way.prepare(reach, head, query + (head - first) * ready);
  for (int64_t i = reach.span_begin; i < reach.span_end; ++i) {
    const Piece piece{reach, {first, last - first}, i, then};
    i == reach.span_begin ? way.attend(piece, query, states) : way.go_on(piece, query, states);
  }
  for (int64_t head = first; head < last; ++head)
    way.write(reach, head, states + (head - first) * floats);
}

// The same with the spans of every block and head as tasks of their own, merged afterwards. Tasks of
// one span lie together: the last spans, which may be short, even out what threads have to do.
template <class Way>
void attend_split(Pool* pool, const Way& way, int64_t spans) {
  const int64_t heads = way.a.call.kv_heads, blocks = way.a.call.plan->blocks;
  const int64_t parts = blocks * heads;
  int64_t queries = 0;
  for (int64_t b = 0; b < blocks; ++b)
    queries = std::max(queries, way.a.queries_of(way.a.reach(b)));
  const int64_t floats = way.floats(queries);
  float* partials = scratch<kPartial>(parts * spans * floats);
  const int64_t ready = way.query_floats(queries);
  const bool once = queries > kQueriesInline;
  float* prepared = once ? scratch<kQueries>(parts * ready) : nullptr;
  if (once)
    each_head(pool, way, [&](int64_t block, int64_t head) {
      way.prepare(way.a.reach(block), head, prepared + (block * heads + head) * ready);
    });
  pool->run(parts * spans, [&](int64_t task) {
    const int64_t at = task % parts;
    const Reach reach = way.a.reach(at / heads);
    const int64_t span = reach.span_begin + task / parts;
    if (span >= reach.span_end) return;
    float* query = once ? prepared + at * ready : scratch<kQueries>(ready);
    if (!once) way.prepare(reach, at % heads, query);
    way.attend({reach, {at % heads, 1}, span}, query,
               partials + (at * spans + task / parts) * floats);
  });
  const auto merge = [&](int64_t block, int64_t head) {
    const Reach reach = way.a.reach(block);
    float* state = partials + (block * heads + head) * spans * floats;
    for (int64_t i = 1; i < reach.span_end - reach.span_begin; ++i)
      way.fold(state + i * floats, way.a.queries_of(reach), state);
    way.write(reach, head, state);
  };
  if (parts * spans * floats > kFloatsInline) return each_head(pool, way, merge);
  for (int64_t at = 0; at < parts; ++at) merge(at / heads, at % heads);
}

template <class Way>
void attend(Pool* pool, const Way& way) {
  if (way.a.call.k != nullptr) append(pool, way);
  if (way.a.call.q == nullptr) return;
  const Plan& plan = *way.a.call.plan;
  const int64_t heads = way.a.call.kv_heads, enough = kTasksPerThread * pool->threads();
  if (plan.blocks >= enough || pool->threads() == 1) {
    return pool->run(plan.blocks, [&](int64_t task) {
      const int64_t block = block_of(task, plan.blocks, pool->threads());
      attend_block(way, block, 0, heads, block - 1);
    });
  }
  int64_t spans = 1;
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const Reach reach = way.a.reach(b);
    spans = std::max(spans, reach.span_end - reach.span_begin);
  }
  if (spans > 1 && plan.blocks * heads < enough) return attend_split(pool, way, spans);
  each_head(pool, way,
            [&](int64_t block, int64_t head) { attend_block(way, block, head, head + 1); });
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_attend(Pool* pool, const AttendCall* call) {
  if (call->storage != Storage::kBF16)
    return attend(pool, Exact<Float32>(Attention<Float32>(*call)));
#if defined(__AVX512BF16__)
  if (call->rounding != 0) return attend(pool, Rounded{Attention<BFloat16>(*call)});
#endif
  attend(pool, Exact<BFloat16>(Attention<BFloat16>(*call)));
}
