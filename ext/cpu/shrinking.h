// What low-rank pieces make of a call's rows before anything is multiplied: its tasks, and where
// their results lie.
#pragma once
#include "projection.h"

namespace blockllm {

constexpr int64_t kRanksPerTask = 32;

// Floats of the shrunk rows of a call.
inline int64_t shrunk_floats(const ProjectCall& call) {
  int64_t floats = 0;
  for (int64_t i = 0; i < call.count; ++i)
    if (const Patch* patch = call.linears[i].patch) floats += patch->shrunk_floats;
  return floats;
}

// starts[layer], where the shrunk rows of each begin, one behind the other from `shrunk` on.
inline float* const* lay_shrunk(const ProjectCall& call, float* shrunk, float** starts) {
  for (int64_t i = 0; i < call.count; ++i) {
    starts[i] = shrunk;
    if (const Patch* patch = call.linears[i].patch) shrunk += patch->shrunk_floats;
  }
  return starts;
}

// Calls body for every task upon a chunk of rows: those that a thread reads for one layer are near
// for the next.
template <class Body>
void for_shrinks(const ProjectCall& call, const Rows& chunk, float* const* starts, Body&& body) {
  for (int64_t i = 0; i < call.count; ++i) {
    const Patch* patch = call.linears[i].patch;
    for (int64_t n = 0; patch != nullptr && n < patch->count; ++n) {
      const Segment& s = patch->segments()[n];
      const int64_t parts = ceil_div(s.rank, kRanksPerTask);
      for_groups(s, chunk, [&](const Rows& group) {
        for (int64_t j = 0; j < parts; ++j)
          body(Shrink{&s, group, part(s.rank, parts, j), starts[i], nullptr});
      });
    }
  }
}

}  // namespace blockllm
