// Chunks of rows, normalized and packed or cut as products read them.
#pragma once
#include <atomic>

#include "norm.h"
#include "projection.h"

namespace blockllm {

// Packs a group of some rows [rows, width], of which there are groups_of(rows), for panels.
inline void pack(const Rows& rows, int64_t g, int64_t width, const float* plain, float* packed) {
  const Rows group = part(rows.count, groups_of(rows.count), g);
  pack_group(plain + (rows.first + group.first) * width, width, group.count,
             packed + group.first * width);
}

// A row, normalized: in `plain` where it is there, or written to `to`.
inline const float* normalized_row(const Projection& p, int64_t row, float* to) {
  const int64_t width = p.call.width;
  if (p.plain != nullptr) return p.plain + row * width;
  normalize(norm_of(p.call.norm, row), p.call.x + row * width, width, to);
  return to;
}

// Cuts some of a chunk's rows for tiles.
inline void cut(const Projection& p, const Rows& chunk, const Rows& some, const Groups& groups,
                uint16_t* pieces) {
  float* row = scratch<kRow>(p.call.width);
  for (int64_t i = some.first; i < some.first + some.count; ++i)
    cut_row(groups, i, normalized_row(p, chunk.first + i, row), p.call.width, pieces);
}

// A number that no call before had.
inline uint64_t number_of_call() {
  static std::atomic<uint64_t> calls{0};
  return ++calls;
}

// The i-th chunk of the call of that number, packed and cut in this thread's scratch, where nothing
// else of a call is: what the task before has left is kept, if it had the same one.
inline Chunk own_chunk(const Projection& p, uint64_t number, int64_t i) {
  static thread_local uint64_t last_call = 0;
  static thread_local int64_t last_chunk = 0;
  const Rows rows = p.chunk(i);
  const Groups groups(rows.count, p.pieces());
  float* packed = p.has_panels ? scratch<kPacked>(rows.count * p.call.width) : nullptr;
  auto* pieces = p.has_tiles ? scratch<kCut, uint16_t>(groups.size(p.call.width)) : nullptr;
  const Chunk chunk{rows, packed, {groups, pieces}};
  if (last_call == number && last_chunk == i) return chunk;
  for (int64_t g = 0; p.has_panels && g < groups_of(rows.count); ++g)
    pack(rows, g, p.call.width, p.plain, packed);
  if (p.has_tiles) cut(p, rows, {0, rows.count}, groups, pieces);
  last_call = number;
  last_chunk = i;
  return chunk;
}

}  // namespace blockllm
