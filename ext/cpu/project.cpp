// y_i = norm(x) W_i^T + bias_i + patch_i(norm(x)) for the linear layers of one call.
//
// Three jobs for the threads: normalize the rows and cut them for tiles; shrink them for the
// low-rank patches, if any; multiply, a few panels of a layer by a chunk of rows at a time. For
// panels, few rows are one chunk, packed at first; of many, a thread packs the chunk of its task,
// if it has not yet, so that it is in the caches when it is read.
#include <atomic>

#include "activation.h"
#include "exports.h"
#include "norm.h"
#include "projection.h"

namespace blockllm {
namespace {

constexpr int64_t kRanksPerTask = 32;
// Where tasks pack their chunks: so many per thread, of which several may pack the same one.
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kTileTasksPerThread = 4;
// Rows of a chunk for tiles: as many as the second-level cache holds beside their sums, and so few
// that each thread has its own.
constexpr int64_t kCutBytes = 1 << 20;
constexpr int64_t kFewestRows = 32, kMostRows = 256;
constexpr int64_t kForeseen = 256 << 10;  // bytes that a thread fetches of a call's weights

// Where the sums of rows by groups of inputs go; null where no layer needs them.
float* room_for_sums(const ProjectCall& call) {
  for (int64_t i = 0; i < call.count; ++i)
    if (call.linears[i].matrix->storage == Storage::kInt4)
      return scratch<kGroupSums>(call.rows * ceil_div(call.width, Int4::kInputs));
  return nullptr;
}

// Packs a group of some rows [rows, width], of which there are groups_of(rows), for panels.
void pack(const Rows& rows, int64_t g, int64_t width, const float* plain, float* packed) {
  const Rows group = part(rows.count, groups_of(rows.count), g);
  pack_group(plain + (rows.first + group.first) * width, width, group.count,
             packed + group.first * width);
}

// Calls body for every task of the shrinking job, chunk by chunk: the rows that a thread reads for
// one linear layer are near for the next. The shrunk rows of each layer begin at `starts`.
template <class Body>
void for_shrinks(const Projection& p, float* const* starts, Body&& body) {
  for (int64_t c = 0; c < p.chunks; ++c) {
    const Rows chunk = p.chunk(c);
    for (int64_t i = 0; i < p.call.count; ++i) {
      const Patch* patch = p.call.linears[i].patch;
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
  auto** starts = scratch<kShrunkStarts, float*>(p.call.count);
  float* start = shrunk;
  for (int64_t i = 0; i < p.call.count; ++i) {
    const Patch* patch = p.call.linears[i].patch;
    starts[i] = start;
    start += patch == nullptr ? 0 : patch->shrunk_floats;
  }
  for_shrinks(p, starts, [&](const Shrink&) { ++tasks; });
  auto* list = scratch<kShrinkTasks, Shrink>(tasks);
  for_shrinks(p, starts, [&, n = int64_t{0}](const Shrink& task) mutable { list[n++] = task; });
  for (int64_t i = 0; i < tasks; ++i)
    list[i].next = list[std::min(i + 1, tasks - 1)].factors(p.call.width);
  pool->run(tasks, [&](int64_t i) {
    shrink(list[i], p.plain, p.call.width, p.call.rounding != 0);
  });
  return starts;
}

// What becomes of a panel's sums: they are written into the columns of `out`, or past the caches
// where many rows would only push out what products read again, or added to them.
enum class Write { kKeep, kPass, kAdd };

template <Write how>
void write_vector(float* to, Vec x) {
  if constexpr (how == Write::kKeep) store(to, x);
  if constexpr (how == Write::kPass) stream(to, x);
  if constexpr (how == Write::kAdd) store(to, add(load(to), x));
}

template <Write how>
void write_out(const Matrix& matrix, float* out, int64_t panel, const Rows& chunk,
               const float* sums) {
  const int64_t column = panel * kPanel, columns = std::min(kPanel, matrix.out - column);
  float* to = out + chunk.first * matrix.out + column;
  for (int64_t r = 0; r < chunk.count; ++r, to += matrix.out, sums += kPanel) {
    if (columns == kPanel) {
      write_vector<how>(to, load(sums));
      write_vector<how>(to + kLanes, load(sums + kLanes));
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c] = how == Write::kAdd ? to[c] + sums[c] : sums[c];
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

  // Panels of a job of the i-th layer.
  int64_t panels(int64_t i) const {
    const Matrix& m = *p.call.linears[i].matrix;
    if (!is_folded(m.storage)) return p.panels_per_job;
    const int64_t bundle = bundle_of(panels_of(m.out));
    return p.has_whole_bundles ? bundle : std::min(bundle, p.panels_per_job);
  }

  int64_t of_layer(int64_t i) const {
    return ceil_div(panels_of(p.call.linears[i].matrix->out), panels(i));
  }

  int64_t count() const {
    int64_t jobs = 0;
    for (int64_t i = first; i < p.call.count; ++i) jobs += of_layer(i);
    return jobs;
  }

  void write(const LinearCall& linear, int64_t panel, const Rows& rows, const float* sums) const {
    const bool passes = kPassesCaches && in_tiles(linear) && p.chunks > 1 &&
                        linear.matrix->out % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(linear.out) % 64 == 0;
    const auto how = p.call.mode == Mode::kAdd ? write_out<Write::kAdd>
                     : passes                  ? write_out<Write::kPass>
                                               : write_out<Write::kKeep>;
    how(*linear.matrix, linear.out, panel, rows, sums);
  }

  void run(int64_t job, const Chunk& chunk) const {
    int64_t i = first;
    for (; job >= of_layer(i); ++i) job -= of_layer(i);
    const LinearCall& linear = p.call.linears[i];
    const int64_t begin = job * this->panels(i), room = room_of(linear, chunk) * kPanel;
    const int64_t gate_room = room_of(p.call.linears[0], chunk) * kPanel;
    const Rows panels{begin, std::min(this->panels(i), panels_of(linear.matrix->out) - begin)};
    float* sums = scratch<kSums>(panels.count * (room + gate_room));
    float* gate = sums + panels.count * room;
    compute(p, i, panels, chunk, sums);
    if (first == 1) compute(p, 0, panels, chunk, gate);
    for (int64_t q = 0; q < panels.count; ++q, sums += room, gate += gate_room) {
      if (first == 1) apply_gate(p.call.gate, gate, chunk.rows.count * kPanel, sums);
      write(linear, begin + q, chunk.rows, sums);
    }
  }
};

// A row, normalized: in `plain` where it is there, or written to `to`.
const float* normalized_row(const Projection& p, int64_t row, float* to) {
  const int64_t width = p.call.width;
  if (p.plain != nullptr) return p.plain + row * width;
  normalize(norm_of(p.call.norm, row), p.call.x + row * width, width, to);
  return to;
}

// What the threads prepare of some rows before anything is multiplied: `plain`, unless it is null,
// and sums by groups.
void prepare(const Projection& p, const Rows& rows, float* plain) {
  const int64_t width = p.call.width;
  for (int64_t r = rows.first; r < rows.first + rows.count; ++r) {
    if (plain != nullptr)
      normalize(norm_of(p.call.norm, r), p.call.x + r * width, width, plain + r * width);
    if (p.group_sums != nullptr)
      sum_groups(p.plain + r * width, width, p.call.rows, p.group_sums + r);
  }
}

// Cuts some of a chunk's rows for tiles.
void cut(const Projection& p, const Rows& chunk, const Rows& some, const Groups& groups,
         uint16_t* pieces) {
  float* row = scratch<kRow>(p.call.width);
  for (int64_t i = some.first; i < some.first + some.count; ++i)
    cut_row(groups, i, normalized_row(p, chunk.first + i, row), p.call.width, pieces);
}

void project_one_chunk(Pool* pool, Projection& p, float* plain) {
  const ProjectCall& call = p.call;
  const Rows rows{0, call.rows};
  const Groups groups(call.rows, p.pieces());
  float* packed =
      p.has_panels && call.rows > 1 ? scratch<kPacked>(call.rows * call.width) : nullptr;
  auto* pieces = p.has_tiles ? scratch<kCut, uint16_t>(groups.size(call.width)) : nullptr;
  const int64_t blocks = groups_of(call.rows);
  pool->run(blocks, [&](int64_t i) {
    const Rows block = part(call.rows, blocks, i);
    prepare(p, block, plain);
    if (pieces != nullptr) cut(p, rows, block, groups, pieces);
    if (packed != nullptr) pack(rows, i, call.width, p.plain, packed);
  });
  p.shrunk = shrink_all(pool, p);
  const Jobs jobs(p);
  const Chunk chunk{rows, packed != nullptr ? packed : p.plain, {groups, pieces}};
  pool->run(jobs.count(), [&](int64_t job) { jobs.run(job, chunk); });
}

// The i-th chunk of the call of that number, packed and cut in this thread's scratch, where nothing
// else of a call is: what the task before has left is kept, if it had the same one.
Chunk own_chunk(const Projection& p, uint64_t number, int64_t i) {
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

void project_chunks(Pool* pool, Projection& p, float* plain) {
  static std::atomic<uint64_t> calls{0};
  const uint64_t number = ++calls;
  if (plain != nullptr || p.group_sums != nullptr)
    pool->run(p.chunks, [&](int64_t i) { prepare(p, p.chunk(i), plain); });
  p.shrunk = shrink_all(pool, p);
  const Jobs jobs(p);
  const int64_t tasks = p.has_panels ? kTasksPerThread : kTileTasksPerThread;
  const int64_t wanted = ceil_div(tasks * (pool->threads() - 1), p.chunks);
  const int64_t parts = std::min(std::max<int64_t>(1, wanted), jobs.count());
  pool->run(p.chunks * parts, [&](int64_t task) {
    const Rows own = part(jobs.count(), parts, task % parts);
    const Chunk chunk = own_chunk(p, number, task / parts);
    for (int64_t job = own.first; job < own.first + own.count; ++job) jobs.run(job, chunk);
    fence_streams();
  });
}

int64_t chunks_of(const ProjectCall& call, bool has_tiles, int64_t threads) {
  const int64_t rows = call.rows;
  if (!has_tiles) {
    const int64_t chunks = rows <= kOneChunk ? 1 : ceil_div(rows, kChunk);
    return chunks < threads ? chunks : ceil_div(chunks, threads) * threads;  // as many for each
  }
  const int64_t most = std::clamp(ceil_div(rows, threads), kMostRows / 2, kMostRows);
  const int64_t row_bytes = Groups(1, pieces_of(call)).size(call.width) * 2;
  return ceil_div(rows, std::clamp(kCutBytes / row_bytes / 32 * 32, kFewestRows, most));
}

// How many panels a task computes: enough sums to hide latencies, few enough to share them out, and
// of tiles, which hide them better, as many for each thread.
int64_t panels_per_job(const ProjectCall& call, bool has_panels, int64_t threads) {
  if (has_panels) return call.rows <= 8 ? 4 : call.rows <= 32 ? 2 : 1;
  const int64_t most = threads * (call.rows <= 8 ? 4 : 1);
  const int64_t panels = panels_of(call.linears[0].matrix->out);
  return ceil_div(panels, threads * ceil_div(panels, most));
}

// Whether a task computes a whole bundle of folded panels, which are read as one stream: of few
// rows, or where each thread has several.
bool has_whole_bundles(const ProjectCall& call, int64_t threads) {
  int64_t bundles = 0;
  for (int64_t i = call.mode == Mode::kGate ? 1 : 0; i < call.count; ++i)
    bundles += Bundles(*call.linears[i].matrix).count();
  return call.rows <= 8 || bundles >= 2 * threads;
}

Projection projection_of(const ProjectCall& call, int64_t threads) {
  const LinearCall* end = call.linears + call.count;
  const bool has_tiles = std::any_of(call.linears, end, in_tiles);
  const bool has_panels = !std::all_of(call.linears, end, in_tiles);
  const int64_t chunks = chunks_of(call, has_tiles, threads);
  const int64_t panels = panels_per_job(call, has_panels, threads);
  return {call, chunks, panels, has_panels, has_tiles, has_whole_bundles(call, threads), call.x};
}

bool has_segments(const LinearCall& linear) {
  return linear.patch != nullptr && linear.patch->count > 0;
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_project(Pool* pool, const ProjectCall* call) { project(pool, *call, nullptr); }

void blockllm::project(Pool* pool, const ProjectCall& call, Errand* errand) {
  Projection p = projection_of(call, pool->threads());
  p.errand = errand;
  const LinearCall* end = call.linears + call.count;
  const bool norms = call.norm.kind != NormKind::kNone;
  const bool reads_plain = p.has_panels || std::any_of(call.linears, end, has_segments);
  float* plain = norms && reads_plain ? scratch<kRows>(call.rows * call.width) : nullptr;
  if (norms) p.plain = plain;
  p.group_sums = room_for_sums(call);
  p.chunks == 1 ? project_one_chunk(pool, p, plain) : project_chunks(pool, p, plain);
}

void blockllm::foresee(Pool* pool, const ProjectCall& call) {
  const Projection p = projection_of(call, pool->threads());
  if (p.chunks > 1) return;
  const Jobs jobs(p);
  for (int thread = 0; thread < pool->threads(); ++thread) {
    int64_t job = Pool::first_task(jobs.count(), thread, pool->threads()), i = jobs.first;
    for (; i < call.count && job >= jobs.of_layer(i); ++i) job -= jobs.of_layer(i);
    if (i == call.count) continue;
    const Matrix& m = *call.linears[i].matrix;
    if (is_grouped(m.storage)) continue;
    const int64_t panels = panels_of(m.out), first = job * jobs.panels(i);
    const Rows lie = bytes_of(m, {first, panels - first});
    pool->foresee(thread, static_cast<const char*>(m.data) + lie.first,
                  std::min(kForeseen, lie.count));
  }
}
