// Projections that follow each other, run as one job: each thread takes a chunk of rows through all
// of them, waits for nobody, and finds what it has made in its own caches.
#include "cutting.h"
#include "jobs.h"

namespace blockllm {
namespace {

// Whether a thread can take its chunks of rows through a call as through the first one.
bool goes_along(const ProjectCall& first, const ProjectCall& call, int64_t threads) {
  const Projection p = projection_of(call, threads);
  return !p.has_panels && !is_patched(call) && call.rows == first.rows && p.chunks > 1 &&
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

}  // namespace
}  // namespace blockllm

using namespace blockllm;

int64_t blockllm::project_together(Pool* pool, const ProjectCall* const* calls, int64_t count,
                                   Errand* errand) {
  const int64_t threads = pool->threads();
  int64_t together = 0;
  while (together < count && goes_along(*calls[0], *calls[together], threads)) ++together;
  if (together < 2) return 0;
  pool->run(projection_of(*calls[0], threads).chunks, [&](int64_t i) {
    uint16_t* through = nullptr;
    for (int64_t c = 0; c < together; ++c) {
      const ProjectCall& call = *calls[c];
      Projection p = projection_of(call, threads);
      p.errand = errand;
      const Chunk chunk =
          through == nullptr ? own_chunk(p, number_of_call(), i) : cut_chunk(p, i, through);
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
