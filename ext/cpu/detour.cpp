// Bottleneck adapters: x += scale * up(act(down(z))) for the rows that have one.
//
// A task takes one group of an adapter's rows through both matrices, so that however many adapters
// a batch has, it is one job.
#include "activation.h"
#include "chunk.h"
#include "exports.h"
#include "product.h"
#include "reading.h"
#include "scratch.h"
#include "tile.h"

namespace blockllm {
namespace {

// sums[panel][row][kPanel] = rows times the matrix, for tiles and for panels.
void multiply_cut(const Matrix& m, const float* x, int64_t rows, float* sums) {
  const Groups groups(rows, kExactPieces);
  auto* pieces = scratch<kCut, uint16_t>(groups.size(m.in));
  for (int64_t r = 0; r < rows; ++r) cut_row(groups, r, x + r * m.in, m.in, pieces);
  multiply_tiles(m, {0, panels_of(m.out)}, {groups, pieces}, sums,
                 [](const Rows&, int64_t, int64_t) { return Lines{}; },
                 [](int64_t, int64_t) { return Stream{}; });
}

template <class T, class Source>
void multiply_panels(const Matrix& m, const float* packed, int64_t rows, float* sums) {
  const int64_t panels = panels_of(m.out), most = panels_per_tile(rows);
  for (int64_t at = 0; at < panels;) {
    const Rows some = Source::together(m, {at, panels - at}, most);
    const Source source(m, some, most, 1);
    for (int64_t i = 0; i < source.runs(); ++i) {
      const Rows taken = source.run(i), run = source.inputs(taken);
      const int64_t tiles = ceil_div(some.count, most);
      for (int64_t n = 0; n < tiles; ++n) {
        const Rows tile{n * most, std::min(most, some.count - n * most)};
        const auto laid = source.take(taken, tile);
        const Stream soon = source.next(taken, tile, 0);
        tile_for<T>(rows, tile.count)(
            {packed + run.first * rows, laid, run.count,
             sums + (at + tile.first) * rows * kPanel, rows * kPanel, i == 0, soon,
             {soon.at, 0, 0}});
      }
    }
    at += some.count;
  }
}

void multiply_packed(const Matrix& m, const float* x, int64_t rows, float* sums) {
  float* packed = scratch<kDetourRows>(rows * m.in);
  pack_group(x, m.in, rows, packed);
  if (m.storage == Storage::kFolded)
    return multiply_panels<BFloat16, FoldedPanelRuns>(m, packed, rows, sums);
  with_storage(m.storage, [&](auto type) {
    multiply_panels<decltype(type), PanelRuns<decltype(type)>>(m, packed, rows, sums);
  });
}

// sums[panel][row][kPanel] = rows [rows, in] times the matrix, plus bias.
void transform(const Matrix& m, const float* bias, const float* x, int64_t rows, float* sums) {
  are_tiles(m.storage) ? multiply_cut(m, x, rows, sums) : multiply_packed(m, x, rows, sums);
  for (int64_t c = 0; bias != nullptr && c < m.out; ++c)
    for (int64_t r = 0; r < rows; ++r)
      sums[(c / kPanel * rows + r) * kPanel + c % kPanel] += bias[c];
}

// The sums of a small matrix, activated, as rows [rows, width] for the next.
void activate_inner(Act kind, int64_t width, int64_t rows, float* sums, float* out) {
  with_act(kind, [&](auto act_kind) {
    for (int64_t i = 0; i < panels_of(width) * rows * kPanel; i += kLanes)
      store(sums + i, act<decltype(act_kind)::value>(load(sums + i)));
  });
  for (int64_t c = 0; c < width; ++c)
    for (int64_t r = 0; r < rows; ++r)
      out[r * width + c] = sums[(c / kPanel * rows + r) * kPanel + c % kPanel];
}

void run_group(const DetourCall& call, const Detour& d, const Rows& group) {
  const int64_t rows = group.count, inner = d.down->out, width = d.up->out;
  float* sums = scratch<kDetourSums>(rows * kPanel * std::max(panels_of(inner), panels_of(width)));
  transform(*d.down, d.down_bias, call.z + group.first * d.down->in, rows, sums);
  float* small = scratch<kInner>(rows * inner);
  activate_inner(d.kind, inner, rows, sums, small);
  transform(*d.up, d.up_bias, small, rows, sums);
  const auto scale = static_cast<float>(d.scale);
  for (int64_t r = 0; r < rows; ++r) {
    float* x = call.x + (group.first + r) * width;
    for (int64_t c = 0; c < width; ++c)
      x[c] += scale * sums[(c / kPanel * rows + r) * kPanel + c % kPanel];
  }
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_detour(Pool* pool, const DetourCall* call) {
  const auto groups = [&](int64_t i) {
    return groups_of(call->detours[i].last - call->detours[i].first);
  };
  int64_t tasks = 0;
  for (int64_t i = 0; i < call->count; ++i) tasks += groups(i);
  pool->run(tasks, [&](int64_t task) {
    int64_t i = 0;
    for (; task >= groups(i); ++i) task -= groups(i);
    const Detour& d = call->detours[i];
    const Rows group = part(d.last - d.first, groups(i), task);
    run_group(*call, d, {d.first + group.first, group.count});
  });
}
