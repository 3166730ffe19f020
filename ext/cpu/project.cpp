// y_i = norm(x) W_i^T + bias_i + patch_i(norm(x)) for the linear layers of one call.
//
// Three jobs: normalize and pack the rows; shrink them for the low-rank patches, if any; then one
// task per (few panels of one layer, chunk of rows). A packed chunk holds groups of at most
// kTileRows rows, each [width][rows of the group].
#include <algorithm>

#include "exports.h"
#include "lora.h"
#include "norm.h"
#include "tile.h"

namespace blockllm {
namespace {

// Inputs per pass: so that a panel's run stays in the first-level cache.
constexpr int64_t kRun = 2048 / kLanes;
// Rows per task, and per task of the shrinking job.
constexpr int64_t kChunk = 96;
constexpr int64_t kShrinkRows = 16;
// Groups of rows from which widening a panel's run once pays.
constexpr int64_t kGroupsToWiden = 3;

struct Rows {
  int64_t first, count;
};

// The i-th of `parts` nearly equal parts of `count` rows.
Rows part(int64_t count, int64_t parts, int64_t i) {
  const int64_t first = count * i / parts;
  return {first, count * (i + 1) / parts - first};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Projection {
  const ProjectCall& call;
  int64_t chunks;  // of rows
  int64_t panels_per_task;
  const float* plain;   // normalized rows [rows, width]: what patches read
  const float* packed;  // the same by groups

  Rows chunk(int64_t i) const { return part(call.rows, chunks, i); }
  static int64_t groups(const Rows& rows) { return ceil_div(rows.count, kTileRows); }
};

void pack_group(const float* plain, int64_t width, int64_t count, float* packed) {
  for (int64_t i = 0; i < count; ++i) {
    const float* row = plain + i * width;
    for (int64_t k = 0; k < width; ++k) packed[k * count + i] = row[k];
  }
}

// Normalizes (where `plain` is given) and packs (where `packed` is) group `g` of a chunk.
void prepare_group(const Projection& p, const Rows& chunk, int64_t g, float* plain, float* packed) {
  const int64_t width = p.call.width;
  const Rows group = part(chunk.count, Projection::groups(chunk), g);
  const int64_t row = chunk.first + group.first;
  if (plain != nullptr) {
    for (int64_t r = row; r < row + group.count; ++r)
      normalize(p.call.norm, p.call.x + r * width, width, plain + r * width);
  }
  if (packed != nullptr)
    pack_group(p.plain + row * width, width, group.count, packed + row * width);
}

void prepare(Pool* pool, const Projection& p, float* plain, float* packed) {
  if (p.chunks == 1) {
    const Rows chunk = p.chunk(0);
    const auto body = [&](int64_t g) { prepare_group(p, chunk, g, plain, packed); };
    return pool->run(Projection::groups(chunk), body);
  }
  pool->run(p.chunks, [&](int64_t i) {
    const Rows chunk = p.chunk(i);
    for (int64_t g = 0; g < Projection::groups(chunk); ++g)
      prepare_group(p, chunk, g, plain, packed);
  });
}

// Widens a run of one panel to float32, which pays where several groups of rows read it.
template <class T>
const uint32_t* widen(const typename T::Element* from, int64_t run) {
  float* wide = scratch<kWidened>(kRun * kPanel);
  for (int64_t k = 0; k < run; ++k) {
    Vec low, high;
    T::widen(from + k * kPanel, low, high);
    store(wide + k * kPanel, low);
    store(wide + k * kPanel + kLanes, high);
  }
  return reinterpret_cast<const uint32_t*>(wide);
}

// The piece of the slot-th segment of the layer's patch, or `none`.
Piece patch_piece(const LinearCall& linear, int64_t slot, int64_t panel, const Piece& none) {
  if (linear.patch == nullptr || slot >= linear.patch->count) return none;
  return piece_of(linear.patch->segments[slot], panel, linear.matrix->out);
}

// sums[panel][row][kPanel] of `panels` panels from `panel` on, for one chunk of rows. Meanwhile
// the next run is fetched, a share by each group, and the patch's pieces, one by each group and
// run.
template <class T>
void multiply(const Projection& p, const LinearCall& linear, int64_t panel, int64_t panels,
              const Rows& chunk, float* sums) {
  using Element = typename T::Element;
  const Matrix& m = *linear.matrix;
  const int64_t stride = m.in * kPanel, groups = Projection::groups(chunk);
  const auto* weights = static_cast<const Element*>(m.data) + panel * stride;
  const bool wide = groups >= kGroupsToWiden && sizeof(Element) == 2;
  const int64_t runs = groups == 1 ? 1 : ceil_div(m.in, kRun), step = kPanel * sizeof(Element);
  for (int64_t i = 0; i < runs; ++i) {
    const Rows run = part(m.in, runs, i);
    const Element* from = weights + run.first * kPanel;
    const uint32_t* widened = wide ? widen<T>(from, run.count) : nullptr;
    const char* next =
        reinterpret_cast<const char*>(from) + (groups == 1 ? kAhead : run.count * step);
    for (int64_t g = 0; g < groups; ++g) {
      const Rows group = part(chunk.count, groups, g);
      const float* a = p.packed + (chunk.first + group.first) * m.in + run.first * group.count;
      float* to = sums + group.first * kPanel;
      const int64_t pace = groups == 1 ? step : ceil_div(step, groups);
      const Piece extra = patch_piece(linear, i * groups + g, panel, {next, 0});
      const char* share = next + g * pace * run.count;
      const Stream soon = {share, pace}, later = {extra.at, ceil_div(extra.bytes, run.count)};
      const auto tile = [&](auto type, const auto* panels_at, int64_t apart) {
        tile_for<decltype(type)>(group.count, panels)(
            {a, panels_at, apart, run.count, to, chunk.count * kPanel, i == 0, soon, later});
      };
      if (wide) {
        tile(Float32{}, widened, 0);
      } else {
        tile(T{}, from, stride);
      }
    }
  }
}

// Adds bias and patch to a panel's sums and writes them out.
void finish(const Projection& p, const LinearCall& linear, int64_t panel, const Rows& chunk,
            const float* shrunk, float* sums) {
  const int64_t out = linear.matrix->out, column = panel * kPanel;
  const int64_t columns = std::min(kPanel, out - column);
  if (linear.bias != nullptr) {
    for (int64_t r = 0; r < chunk.count; ++r)
      for (int64_t c = 0; c < columns; ++c) sums[r * kPanel + c] += linear.bias[column + c];
  }
  if (linear.patch != nullptr)
    expand(*linear.patch, shrunk, panel, out, chunk.first, chunk.first + chunk.count, sums);
  for (int64_t r = 0; r < chunk.count; ++r) {
    const float* from = sums + r * kPanel;
    float* to = linear.out + (chunk.first + r) * out + column;
    if (p.call.accumulate) {
      for (int64_t c = 0; c < columns; ++c) to[c] += from[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c] = from[c];
    }
  }
}

void run_task(const Projection& p, const LinearCall& linear, int64_t task, const float* shrunk) {
  const Rows chunk = p.chunk(task % p.chunks);
  const int64_t first = task / p.chunks * p.panels_per_task;
  const int64_t last = std::min(first + p.panels_per_task, panels_of(linear.matrix->out));
  const int64_t tallest = ceil_div(chunk.count, Projection::groups(chunk));
  float* sums = scratch<kSums>(p.panels_per_task * chunk.count * kPanel);
  for (int64_t panel = first; panel < last;) {
    int64_t panels = panels_per_tile(tallest);
    while (panels > last - panel) panels /= 2;
    with_storage(linear.matrix->storage, [&](auto type) {
      multiply<decltype(type)>(p, linear, panel, panels, chunk, sums);
    });
    for (int64_t i = 0; i < panels; ++i)
      finish(p, linear, panel + i, chunk, shrunk, sums + i * chunk.count * kPanel);
    panel += panels;
  }
}

struct ShrinkTask {
  const Segment* segment;
  float* shrunk;
  int64_t first, last;
};

// Shrinks the rows of every patched segment; returns where each linear layer's shrunk rows begin.
const float* const* shrink_all(Pool* pool, const ProjectCall& call, const float* plain) {
  int64_t floats = 0, tasks = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    const Patch* patch = call.linears[i].patch;
    for (int64_t s = 0; patch != nullptr && s < patch->count; ++s)
      tasks += ceil_div(patch->segments[s].last - patch->segments[s].first, kShrinkRows);
    floats += patch == nullptr ? 0 : patch->shrunk_floats;
  }
  float* shrunk = scratch<kShrunk>(floats);
  auto* starts = scratch<kShrunkStarts, const float*>(call.count);
  auto* list = scratch<kShrinkTasks, ShrinkTask>(tasks);
  int64_t n = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    starts[i] = shrunk;
    const Patch* patch = call.linears[i].patch;
    if (patch == nullptr) continue;
    for (const Segment* s = patch->segments; s != patch->segments + patch->count; ++s)
      for (int64_t row = s->first; row < s->last; row += kShrinkRows)
        list[n++] = {s, shrunk, row, std::min(row + kShrinkRows, s->last)};
    shrunk += patch->shrunk_floats;
  }
  pool->run(tasks, [&](int64_t i) {
    shrink(*list[i].segment, plain, call.width, list[i].first, list[i].last, list[i].shrunk);
  });
  return starts;
}

void multiply_all(Pool* pool, const Projection& p, const float* const* shrunk) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < p.call.count; ++i)
    tasks += ceil_div(panels_of(p.call.linears[i].matrix->out), p.panels_per_task) * p.chunks;
  pool->run(tasks, [&](int64_t task) {
    int64_t i = 0;
    for (;; ++i) {
      const int64_t own =
          ceil_div(panels_of(p.call.linears[i].matrix->out), p.panels_per_task) * p.chunks;
      if (task < own) break;
      task -= own;
    }
    run_task(p, p.call.linears[i], task, shrunk[i]);
  });
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_project(Pool* pool, const ProjectCall* call) {
  const int64_t floats = call->rows * call->width;
  const bool normed = call->norm.kind != NormKind::kNone, packs = call->rows > 1;
  float* plain = normed ? scratch<kRows>(floats) : nullptr;
  float* packed = packs ? scratch<kPacked>(floats) : nullptr;
  const float* rows = normed ? plain : call->x;
  const int64_t panels = call->rows <= 8 ? 4 : call->rows <= 32 ? 2 : 1;
  const Projection p{*call, ceil_div(call->rows, kChunk), panels, rows, packs ? packed : rows};
  if (normed || packs) prepare(pool, p, plain, packed);
  multiply_all(pool, p, shrink_all(pool, *call, rows));
}
