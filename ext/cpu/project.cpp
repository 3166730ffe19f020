// y_i = norm(x) W_i^T + bias_i + patch_i(norm(x)) for the linear layers of one call.
//
// Three jobs for the threads: normalize the rows; shrink them for the low-rank patches, if any;
// multiply, a few panels of a layer by a chunk of rows at a time. Few rows are one chunk, packed at
// first; of many, a task packs its own chunk, so that it is in the caches when it is read.
#include "activation.h"
#include "exports.h"
#include "norm.h"
#include "projection.h"

namespace blockllm {
namespace {

constexpr int64_t kRanksPerTask = 32;
constexpr int64_t kTasksPerThread = 8;  // where tasks pack their chunks
constexpr int64_t kCutBytes = 1 << 20;  // of a chunk's rows cut for tiles

// Normalizes rows into `plain`, unless it is null.
void normalize_rows(const ProjectCall& call, const Rows& rows, float* plain) {
  const int64_t width = call.width;
  for (int64_t r = rows.first; plain != nullptr && r < rows.first + rows.count; ++r)
    normalize(norm_of(call.norm, r), call.x + r * width, width, plain + r * width);
}

// The sums of rows by groups of inputs, for the layers whose codes have offsets.
void sum_rows(const Projection& p, const Rows& rows) {
  const int64_t width = p.call.width;
  for (int64_t r = rows.first; p.group_sums != nullptr && r < rows.first + rows.count; ++r)
    sum_groups(p.plain + r * width, width, p.call.rows, p.group_sums + r);
}

// Where those sums go; null where no layer needs them.
float* room_for_sums(const ProjectCall& call) {
  for (int64_t i = 0; i < call.count; ++i)
    if (call.linears[i].matrix->storage == Storage::kInt4)
      return scratch<kGroupSums>(call.rows * ceil_div(call.width, Int4::kInputs));
  return nullptr;
}

// Groups of some rows, from [rows, width] into their places among the packed groups: those for
// panels, of which there are groups_of(rows), and those for tiles.
void pack(const Rows& rows, int64_t g, int64_t width, const float* plain, float* packed) {
  const Rows group = part(rows.count, groups_of(rows.count), g);
  pack_group(plain + (rows.first + group.first) * width, width, group.count,
             packed + group.first * width);
}

void cut(const Rows& rows, int64_t g, int64_t width, const float* plain, uint16_t* packed) {
  const Rows group = part(rows.count, ceil_div(rows.count, kHeight), g);
  if constexpr (kHasTiles)
    cut_group(plain + (rows.first + group.first) * width, width, group.count,
              packed + cut_size(group.first, width));
}

struct ShrinkTask {
  const Segment* segment;
  float* shrunk;
  Rows group, ranks;
};

// Calls body(segment, shrunk rows of its layer, group, ranks) for every task of the shrinking job.
template <class Body>
void for_shrinks(const Projection& p, float* shrunk, Body&& body) {
  for (int64_t i = 0; i < p.call.count; ++i) {
    const Patch* patch = p.call.linears[i].patch;
    if (patch == nullptr) continue;
    for (const Segment* s = patch->segments(); s != patch->segments() + patch->count; ++s) {
      const int64_t parts = ceil_div(s->rank, kRanksPerTask);
      for (int64_t c = 0; c < p.chunks; ++c)
        for_groups(*s, p.chunk(c), [&](const Rows& group) {
          for (int64_t j = 0; j < parts; ++j)
            body(ShrinkTask{s, shrunk, group, part(s->rank, parts, j)});
        });
    }
    shrunk += patch->shrunk_floats;
  }
}

// Shrinks the rows of every patched segment; returns where each linear layer's shrunk rows begin.
const float* const* shrink_all(Pool* pool, const Projection& p) {
  int64_t floats = 0, tasks = 0;
  for (int64_t i = 0; i < p.call.count; ++i) {
    const Patch* patch = p.call.linears[i].patch;
    floats += patch == nullptr ? 0 : patch->shrunk_floats;
  }
  if (floats == 0) return nullptr;
  float* shrunk = scratch<kShrunk>(floats);
  auto* starts = scratch<kShrunkStarts, const float*>(p.call.count);
  const float* start = shrunk;
  for (int64_t i = 0; i < p.call.count; ++i) {
    const Patch* patch = p.call.linears[i].patch;
    starts[i] = start;
    start += patch == nullptr ? 0 : patch->shrunk_floats;
  }
  for_shrinks(p, shrunk, [&](const ShrinkTask&) { ++tasks; });
  auto* list = scratch<kShrinkTasks, ShrinkTask>(tasks);
  for_shrinks(p, shrunk, [&, n = int64_t{0}](const ShrinkTask& task) mutable { list[n++] = task; });
  pool->run(tasks, [&](int64_t i) {
    const ShrinkTask& t = list[i];
    with_storage(t.segment->a_storage, [&](auto type) {
      shrink<decltype(type)>(*t.segment, t.group, t.ranks, p.plain, p.call.width, t.shrunk);
    });
  });
  return starts;
}

// One panel's sums [row][kPanel] into, or onto, the columns of `out`.
void write_out(const ProjectCall& call, const Matrix& matrix, float* out, int64_t panel,
               const Rows& chunk, const float* sums) {
  const int64_t column = panel * kPanel, columns = std::min(kPanel, matrix.out - column);
  for (int64_t r = 0; r < chunk.count; ++r) {
    float* to = out + (chunk.first + r) * matrix.out + column;
    const float* from = sums + r * kPanel;
    if (call.mode == Mode::kAdd) {
      for (int64_t c = 0; c < columns; ++c) to[c] += from[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c] = from[c];
    }
  }
}

// sums = act(gate) * sums
void apply_gate(Act kind, const float* gate, int64_t count, float* sums) {
  with_act(kind, [&](auto act_kind) {
    for (int64_t i = 0; i < count; i += kLanes)
      store(sums + i, mul(act<decltype(act_kind)::value>(load(gate + i)), load(sums + i)));
  });
}

// Jobs: the few panels at a time that the layers of a call are computed by, one after the other.
// Where the call has a gate, the panels of `up` are computed with those of the gate.
struct Jobs {
  const Projection& p;
  int64_t first;  // layer

  explicit Jobs(const Projection& projection)
      : p(projection), first(projection.call.mode == Mode::kGate ? 1 : 0) {}

  int64_t of_layer(int64_t i) const {
    return ceil_div(panels_of(p.call.linears[i].matrix->out), p.panels_per_job);
  }

  int64_t count() const {
    int64_t jobs = 0;
    for (int64_t i = first; i < p.call.count; ++i) jobs += of_layer(i);
    return jobs;
  }

  void run(int64_t job, const Chunk& chunk) const {
    int64_t i = first;
    for (; job >= of_layer(i); ++i) job -= of_layer(i);
    const LinearCall& linear = p.call.linears[i];
    const int64_t begin = job * p.panels_per_job, floats = chunk.rows.count * kPanel;
    const Rows panels{begin, std::min(p.panels_per_job, panels_of(linear.matrix->out) - begin)};
    float* sums = scratch<kSums>(2 * p.panels_per_job * floats);
    compute(p, i, panels, chunk, sums);
    if (first == 1) {
      float* gate = sums + panels.count * floats;
      compute(p, 0, panels, chunk, gate);
      apply_gate(p.call.gate, gate, panels.count * floats, sums);
    }
    for (int64_t q = 0; q < panels.count; ++q)
      write_out(p.call, *linear.matrix, linear.out, begin + q, chunk.rows, sums + q * floats);
  }
};

void project_one_chunk(Pool* pool, Projection& p, float* normed) {
  const ProjectCall& call = p.call;
  const Rows rows{0, call.rows};
  const bool packs = p.has_panels && call.rows > 1;
  float* packed = packs ? scratch<kPacked>(call.rows * call.width) : nullptr;
  auto* pieces = p.has_tiles ? scratch<kCut, uint16_t>(cut_size(call.rows, call.width)) : nullptr;
  const int64_t groups = p.has_tiles ? ceil_div(call.rows, kHeight) : groups_of(call.rows);
  pool->run(groups, [&](int64_t g) {
    normalize_rows(call, part(call.rows, groups, g), normed);
    sum_rows(p, part(call.rows, groups, g));
    if (p.has_tiles) {
      cut(rows, g, call.width, p.plain, pieces);
    } else if (packs) {
      pack(rows, g, call.width, p.plain, packed);
    }
  });
  for (int64_t g = 0; p.has_tiles && packs && g < groups_of(call.rows); ++g)
    pack(rows, g, call.width, p.plain, packed);
  p.shrunk = shrink_all(pool, p);
  const Jobs jobs(p);
  const Chunk chunk{rows, packs ? packed : p.plain, pieces};
  pool->run(jobs.count(), [&](int64_t job) { jobs.run(job, chunk); });
}

void project_chunks(Pool* pool, Projection& p, float* normed) {
  const int64_t width = p.call.width;
  if (normed != nullptr || p.group_sums != nullptr)
    pool->run(p.chunks, [&](int64_t i) {
      normalize_rows(p.call, p.chunk(i), normed);
      sum_rows(p, p.chunk(i));
    });
  p.shrunk = shrink_all(pool, p);
  const Jobs jobs(p);
  const int64_t wanted = ceil_div(kTasksPerThread * (pool->threads() - 1), p.chunks);
  const int64_t parts = std::min(std::max<int64_t>(1, wanted), jobs.count());
  pool->run(p.chunks * parts, [&](int64_t task) {
    const Rows rows = p.chunk(task / parts), own = part(jobs.count(), parts, task % parts);
    float* packed = p.has_panels ? scratch<kPacked>(rows.count * width) : nullptr;
    auto* pieces = p.has_tiles ? scratch<kCut, uint16_t>(cut_size(rows.count, width)) : nullptr;
    for (int64_t g = 0; p.has_panels && g < groups_of(rows.count); ++g)
      pack(rows, g, width, p.plain, packed);
    for (int64_t g = 0; p.has_tiles && g < ceil_div(rows.count, kHeight); ++g)
      cut(rows, g, width, p.plain, pieces);
    for (int64_t job = own.first; job < own.first + own.count; ++job)
      jobs.run(job, {rows, packed, pieces});
  });
}

// Rows of a chunk: for tiles as many as the second-level cache holds beside a panel.
int64_t chunk_rows(const ProjectCall& call, bool has_tiles) {
  if (!has_tiles) return kChunk;
  const int64_t pairs = kCutBytes / (cut_size(2 * kHeight, call.width) * sizeof(uint16_t));
  return 2 * kHeight * std::max<int64_t>(1, pairs);
}

// How many panels a task computes: enough sums to hide latencies, few enough to share them out.
int64_t panels_per_job(int64_t rows, bool has_panels) {
  if (!has_panels) return rows <= 8 ? 4 : 1;
  return rows <= 8 ? 4 : rows <= 32 ? 2 : 1;
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_project(Pool* pool, const ProjectCall* call) {
  const LinearCall* end = call->linears + call->count;
  const bool has_tiles = std::any_of(call->linears, end, in_tiles);
  const bool has_panels = !std::all_of(call->linears, end, in_tiles);
  const int64_t size = chunk_rows(*call, has_tiles);
  const int64_t chunks = call->rows <= std::max(size, kOneChunk) ? 1 : ceil_div(call->rows, size);
  const int64_t panels = panels_per_job(call->rows, has_panels);
  const bool norms = call->norm.kind != NormKind::kNone;
  float* normed = norms ? scratch<kRows>(call->rows * call->width) : nullptr;
  Projection p{*call,   chunks, panels, has_panels, has_tiles, norms ? normed : call->x,
               nullptr, room_for_sums(*call)};
  chunks == 1 ? project_one_chunk(pool, p, normed) : project_chunks(pool, p, normed);
}
