// Products of rows in pieces (pieces.h) and matrices in tiles (tiles.h).
//
// A sum takes, for 32 inputs at a time, a row's pieces one after the other, in the same order
// whatever the number of rows, and leaves the registers exactly: so a row's result does not depend
// on the other rows of the batch.
#pragma once
#include "amx.h"
#include "dots.h"
#include "pieces.h"
#include "reading.h"
#include "tile.h"

namespace blockllm {

// Rows in pieces. Their sums are [panel][row][kPanel], with the room of the groups.
struct Cut {
  Groups groups;
  const uint16_t* pieces;
};

#if defined(__AVX512BF16__)

// Panels that are multiplied at once.
inline int64_t tiles_at_once(const Cut& rows) {
  return kGroupsAtOnce == 1 ? panels_per_tile(rows.groups.room()) : 1;
}

// sums[panel][row][kPanel] = rows times some panels, which are read together. It takes several
// turns, in each of which the lines of later(turn, turns) are fetched, and what far(inputs,
// products with each) names.
template <int PIECES, class Source, class Later, class Far>
void multiply_together(const Cut& rows, const Source& source, int64_t panels, int64_t steps,
                       float* sums, const Later& later, const Far& far) {
  const int64_t groups = rows.groups.count, room = rows.groups.room();
  const int64_t width = steps * kDepth, turns = ceil_div(groups, kGroupsAtOnce);
  const int64_t runs = source.runs();
  const int64_t most = tiles_at_once(rows), tiles = ceil_div(panels, most);
  const Rows* all = rows.groups.list();
  const int64_t lines_of_one =
      ceil_div(source.next(source.run(0), {0, 1}).pace / 64, turns * PIECES);
  for (int64_t i = 0; i < runs; ++i) {
    const Rows run = source.run(i);
    for (int64_t t = 0; t < tiles; ++t) {
      const Rows tile{t * most, std::min(most, panels - t * most)};
      const auto laid = source.take(run, tile);
      Stream soon = source.next(run, tile);
      const int64_t lines = tile.count > 1 ? 0 : lines_of_one;
      for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t g = turn * kGroupsAtOnce, at_once = std::min(kGroupsAtOnce, groups - g);
        const Rows& group = all[g];
        const uint16_t* pieces = rows.pieces + rows.groups.size(group.first, width);
        multiply_run<PIECES>(
            {pieces + run.first * PIECES * group.count * kDepth,
             rows.groups.size(group.count, width), group.count, laid, run.count, tile.count,
             sums + (tile.first * room + group.first) * kPanel, room * kPanel, i == 0,
             soon, lines, later((i * tiles + t) * turns + turn, runs * tiles * turns),
             far(run.count * kDepth, at_once * group.count * tile.count * kPanel)},
            at_once);
        soon.at += lines * PIECES * 64 * run.count;
      }
    }
  }
}

// sums[panel][row][kPanel] = rows times some panels of a matrix. While a few of these are
// multiplied, the lines of later(panels, turn, turns) are fetched in each turn, and what far says.
template <class Source, class Later, class Far>
void multiply_each(const Matrix& m, const Rows& panels, const Cut& rows, float* sums,
                   const Later& later, const Far& far) {
  const int64_t steps = steps_of(m.in);
  const TileRegisters registers(rows.groups.height());
  for (int64_t at = 0; at < panels.count;) {
    const Rows left{panels.first + at, panels.count - at};
    const Rows some = Source::together(m, left, tiles_at_once(rows));
    const int64_t turns = ceil_div(rows.groups.count, kGroupsAtOnce);
    const Source source(m, some, tiles_at_once(rows), rows.groups.pieces == 1 ? turns : 1);
    float* to = sums + at * rows.groups.room() * kPanel;
    const auto own = [&](int64_t turn, int64_t turns) { return later(some, turn, turns); };
    rows.groups.pieces == 1
        ? multiply_together<1>(rows, source, some.count, steps, to, own, far)
        : multiply_together<kExactPieces>(rows, source, some.count, steps, to, own, far);
    at += some.count;
  }
}

template <class Later, class Far>
void multiply_tiles(const Matrix& m, const Rows& panels, const Cut& rows, float* sums,
                    const Later& later, const Far& far) {
  if constexpr (!kExactInTiles)
    if (m.storage == Storage::kFoldedTiles)
      return multiply_each<FoldedTileRuns>(m, panels, rows, sums, later, far);
  multiply_each<TileRuns>(m, panels, rows, sums, later, far);
}

#else

template <class Later, class Far>
void multiply_tiles(const Matrix&, const Rows&, const Cut&, float*, const Later&, const Far&) {}

#endif

}  // namespace blockllm
