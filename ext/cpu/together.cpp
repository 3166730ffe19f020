// Projections that follow each other, run as one job: each thread takes a chunk of rows through all
// of them, waits for nobody, and finds what it has made in its own caches.
#include "cutting.h"
#include "jobs.h"
#include "shrinking.h"

namespace blockllm {
namespace {

// Whether a thread can take its chunks of rows through a call as through the first one.
bool goes_along(const ProjectCall& first, const ProjectCall& call, int64_t threads) {
  const Projection p = projection_of(call, threads);
  return p.shrinks_cut && call.mode != Mode::kBest && call.rows == first.rows && p.chunks > 1 &&
         p.chunks % threads == 0 && p.chunks == projection_of(first, threads).chunks;
}

// Whether a call reads what a gate makes, as it is.
bool reads_gated(const ProjectCall& gate, const ProjectCall& call) {
  return gate.mode == Mode::kGate && call.x == gate.linears[gate.count - 1].out &&
         call.norm.kind == NormKind::kNone && call.rounding == gate.rounding;
}

// The i-th chunk of rows that were cut before.
Chunk cut_chunk(const Projection& p, int64_t i, const uint16_t* pieces) {
  const Rows rows = p.chunk(i);
  return {rows, nullptr, {Groups(rows.count, p.pieces()), pieces}};
}

// Where the shrunk rows of each layer of some calls go; null for calls without low-rank pieces.
struct AllShrunk {
  float* const* starts[kMostTogether] = {};

  AllShrunk(const ProjectCall* const* calls, int64_t count) {
    int64_t floats = 0, layers = 0;
    for (int64_t c = 0; c < count; ++c) {
      floats += shrunk_floats(*calls[c]);
      layers += calls[c]->count;
    }
    if (floats == 0) return;
    float* next = scratch<kShrunk>(floats);
    float** places = scratch<kShrunkStarts, float*>(layers);
    for (int64_t c = 0; c < count; ++c, places += calls[c - 1]->count) {
      const int64_t own = shrunk_floats(*calls[c]);
      if (own > 0) starts[c] = lay_shrunk(*calls[c], next, places);
      next += own;
    }
  }
};

// Shrinks a chunk's rows, which are cut, for the low-rank pieces upon them.
void shrink_chunk(const ProjectCall& call, const Chunk& chunk, float* const* starts) {
  Shrink last = {};
  const auto run = [&](const void* next) {
    last.next = next;
    shrink_cut(last, chunk.cut.groups, chunk.cut.pieces, chunk.rows.first, call.width);
  };
  for_shrinks(call, chunk.rows, starts, [&](const Shrink& task) {
    if (last.segment != nullptr) run(task.factors(call.width));
    last = task;
  });
  if (last.segment != nullptr) run(last.factors(call.width));
}

// A gate and the call behind it, of few rows: what passes between them is cut by who makes it.
int64_t project_gated(Pool* pool, const ProjectCall& gate, const ProjectCall& call,
                      Errand* errand) {
  if (!reads_gated(gate, call)) return 0;
  const Projection one = projection_of(gate, pool->threads());
  const Projection other = projection_of(call, pool->threads());
  if (one.chunks > 1 || other.chunks > 1 || !other.shrinks_cut) return 0;
  const Groups groups(call.rows, other.pieces());
  auto* pieces = scratch<kThrough, uint16_t>(groups.size(call.width));
  project(pool, gate, errand, {nullptr, pieces});
  project(pool, call, errand, {pieces, nullptr});
  return 2;
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

int64_t blockllm::project_together(Pool* pool, const ProjectCall* const* calls, int64_t count,
                                   Errand* errand) {
  const int64_t threads = pool->threads();
  int64_t together = 0;
  while (together < std::min(count, kMostTogether) &&
         goes_along(*calls[0], *calls[together], threads))
    ++together;
  if (together < 2) return count < 2 ? 0 : project_gated(pool, *calls[0], *calls[1], errand);
  const AllShrunk shrunk(calls, together);
  pool->run(projection_of(*calls[0], threads).chunks, [&](int64_t i) {
    uint16_t* through = nullptr;
    for (int64_t c = 0; c < together; ++c) {
      const ProjectCall& call = *calls[c];
      Projection p = projection_of(call, threads);
      p.errand = errand;
      p.shrunk = shrunk.starts[c];
      const Chunk chunk =
          through == nullptr ? own_chunk(p, number_of_call(), i) : cut_chunk(p, i, through);
      if (p.shrunk != nullptr) shrink_chunk(call, chunk, shrunk.starts[c]);
      through = nullptr;
      if (c + 1 < together && reads_gated(call, *calls[c + 1]))
        through = scratch<kThrough, uint16_t>(chunk.cut.groups.size(calls[c + 1]->width));
      const Jobs jobs(p, through);
      for (int64_t job = 0; job < jobs.count(); ++job) jobs.run(job, chunk);
    }
    fence_streams();
  });
  return together;
}
