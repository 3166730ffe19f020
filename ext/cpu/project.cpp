// y_i = norm(x) W_i^T + bias_i + patch_i(norm(x)) for the linear layers of one call.
//
// Three jobs for the threads: normalize the rows and cut them for tiles; shrink them for the
// low-rank patches, if any; multiply, a few panels of a layer by a chunk of rows at a time. For
// panels, few rows are one chunk, packed at first; of many, a thread packs the chunk of its task,
// if it has not yet, so that it is in the caches when it is read.
#include "cutting.h"
#include "exports.h"
#include "jobs.h"
#include "shrinking.h"

namespace blockllm {
namespace {

// Where tasks pack their chunks: so many per thread, of which several may pack the same one.
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kTileTasksPerThread = 4;
constexpr int64_t kForeseen = 256 << 10;  // bytes that a thread fetches of a call's weights

// Where the sums of rows by groups of inputs go; null where no layer needs them.
float* room_for_sums(const ProjectCall& call) {
  for (int64_t i = 0; i < call.count; ++i)
    if (call.linears[i].matrix->storage == Storage::kInt4)
      return scratch<kGroupSums>(call.rows * ceil_div(call.width, Int4::kInputs));
  return nullptr;
}

// Shrinks a call's rows for every patched segment, as they were cut in `all`, or if that is null as
// they are; returns where each linear layer's shrunk rows begin.
const float* const* shrink_all(Pool* pool, const Projection& p, const Cut* all) {
  const int64_t floats = shrunk_floats(p.call);
  if (floats == 0) return nullptr;
  float* const* starts = lay_shrunk(p.call, scratch<kShrunk>(floats),
                                    scratch<kShrunkStarts, float*>(p.call.count));
  int64_t tasks = 0;
  const auto each = [&](auto&& body) {
    for (int64_t c = 0; c < p.chunks; ++c) for_shrinks(p.call, p.chunk(c), starts, body);
  };
  each([&](const Shrink&) { ++tasks; });
  auto* list = scratch<kShrinkTasks, Shrink>(tasks);
  each([&, n = int64_t{0}](const Shrink& task) mutable { list[n++] = task; });
  for (int64_t i = 0; i < tasks; ++i)
    list[i].next = list[std::min(i + 1, tasks - 1)].factors(p.call.width);
  pool->run(tasks, [&](int64_t i) {
    all != nullptr
        ? shrink_cut(list[i], all->groups, all->pieces, 0, p.call.width)
        : shrink(list[i], p.plain, p.call.width, p.call.rounding != 0);
  });
  return starts;
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

// Into how many blocks the rows of one chunk are divided to be prepared: packed ones by groups, the
// others so that each thread has as many; but one group is soon done.
int64_t blocks_of(int64_t rows, bool packs, int64_t threads) {
  const int64_t groups = groups_of(rows);
  return packs || groups == 1 ? groups : ceil_div(groups, threads) * threads;
}

void project_one_chunk(Pool* pool, Projection& p, float* plain, const Through& through) {
  const ProjectCall& call = p.call;
  const Rows rows{0, call.rows};
  const Groups groups(call.rows, p.pieces());
  float* packed =
      p.has_panels && call.rows > 1 ? scratch<kPacked>(call.rows * call.width) : nullptr;
  auto* pieces = p.has_tiles && through.rows == nullptr
                     ? scratch<kCut, uint16_t>(groups.size(call.width))
                     : nullptr;
  const Chunk chunk{rows,
                    packed != nullptr ? packed : p.plain,
                    {groups, through.rows != nullptr ? through.rows : pieces}};
  const int64_t blocks =
      through.rows != nullptr ? 0 : blocks_of(call.rows, packed != nullptr, pool->threads());
  pool->run(blocks, [&](int64_t i) {
    const Rows block = part(call.rows, blocks, i);
    prepare(p, block, plain);
    if (pieces != nullptr) cut(p, rows, block, groups, pieces);
    if (packed != nullptr) pack(rows, i, call.width, p.plain, packed);
  });
  p.shrunk = shrink_all(pool, p, p.shrinks_cut ? &chunk.cut : nullptr);
  const Jobs jobs(p, through.results);
  pool->run(jobs.count(), [&](int64_t job) { jobs.run(job, chunk); });
}

void project_chunks(Pool* pool, Projection& p, float* plain) {
  const uint64_t number = number_of_call();
  if (plain != nullptr || p.group_sums != nullptr)
    pool->run(p.chunks, [&](int64_t i) { prepare(p, p.chunk(i), plain); });
  p.shrunk = shrink_all(pool, p, nullptr);
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

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_project(Pool* pool, const ProjectCall* call) { project(pool, *call, nullptr); }

void blockllm::project(Pool* pool, const ProjectCall& call, Errand* errand,
                       const Through& through) {
  Projection p = projection_of(call, pool->threads());
  p.errand = errand;
  const bool norms = call.norm.kind != NormKind::kNone;
  const bool reads_plain =
      p.has_panels || (is_patched(call) && (p.chunks > 1 || !p.shrinks_cut));
  float* plain = norms && reads_plain ? scratch<kRows>(call.rows * call.width) : nullptr;
  if (norms) p.plain = plain;
  p.group_sums = room_for_sums(call);
  if (call.mode == Mode::kBest) {
    const int64_t threads = pool->threads();
    p.bests = {scratch<kBests, Best>(Bests::size(call.rows, threads)), call.rows, threads};
  }
  p.chunks == 1 ? project_one_chunk(pool, p, plain, through) : project_chunks(pool, p, plain);
  if (p.bests) p.bests.write(reinterpret_cast<int64_t*>(call.linears[0].out));
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
