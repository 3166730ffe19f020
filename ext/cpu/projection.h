// A projection under way: the call, how its rows and panels are shared out, and the products of one
// task.
#pragma once
#include "best.h"
#include "errand.h"
#include "grouped.h"
#include "lora.h"
#include "product.h"
#include "reading.h"
#include "runs.h"
#include "scratch.h"

namespace blockllm {

// Rows in pieces (pieces.h) that a call takes in place of its own, and where it leaves its results,
// cut, in place of writing them. Null: it does not.
struct Through {
  const uint16_t* rows = nullptr;
  uint16_t* results = nullptr;
};

// A call; meanwhile the threads go on an errand, unless it is null.
void project(Pool* pool, const ProjectCall& call, Errand* errand, const Through& through = {});

// As many projections as there are between two attentions, where MLPs alternate with them.
constexpr int64_t kMostTogether = 4;

// Runs the first of some calls that follow each other: so many that a thread can take a chunk of many
// rows through all of them; of few rows, a gate and the call that reads it. Returns how many, or 0 if
// that would be one. What a gate makes is not written then: nobody else may read it.
int64_t project_together(Pool* pool, const ProjectCall* const* calls, int64_t count,
                         Errand* errand);

// Tells the threads what each will read first of a call that comes before long.
void foresee(Pool* pool, const ProjectCall& call);

// Rows per task, and up to how many are not divided.
constexpr int64_t kChunk = 48;
constexpr int64_t kOneChunk = 96;

// Of each of the call's rows.
inline int64_t pieces_of(const ProjectCall& call) { return call.rounding != 0 ? 1 : kExactPieces; }

inline bool has_segments(const LinearCall& linear) {
  return linear.patch != nullptr && linear.patch->count > 0;
}

// Whether low-rank pieces lie upon some layer.
inline bool is_patched(const ProjectCall& call) {
  return std::any_of(call.linears, call.linears + call.count, has_segments);
}

// Whether those, if any, are of bfloat16, and the call's rows one piece.
inline bool shrinks_as_cut(const ProjectCall& call) {
  for (int64_t i = 0; i < call.count; ++i) {
    const Patch* patch = call.linears[i].patch;
    for (int64_t n = 0; patch != nullptr && n < patch->count; ++n)
      if (patch->segments()[n].a_storage != Storage::kBF16 || call.rounding == 0) return false;
  }
  return true;
}

struct Projection {
  const ProjectCall& call;
  const int64_t chunks;  // of rows
  const int64_t panels_per_job;
  const bool has_panels, has_tiles;      // among the layers
  const bool shrinks_cut;                // its rows as they are cut, not `plain`
  const bool has_whole_bundles;          // in its tasks
  const float* plain = nullptr;          // rows [rows, width], normalized; null: nothing reads them
  const float* const* shrunk = nullptr;  // of each linear layer
  float* group_sums = nullptr;           // of the rows, where weights are codes with offsets
  Bests bests = {};                      // of the rows, where nothing else is wanted
  Errand* errand = nullptr;

  // Whether results are written, of many rows.
  bool writes_many() const { return chunks > 1 && !bests; }
  // Of panels, whole groups, so that most tiles are full.
  Rows chunk(int64_t i) const {
    if (has_tiles || chunks == 1) return part(call.rows, chunks, i);
    const Rows groups = part(groups_of(call.rows), chunks, i);
    const int64_t first = groups.first * kTileRows;
    return {first, std::min(groups.count * kTileRows, call.rows - first)};
  }
  int64_t pieces() const { return pieces_of(call); }
  // What to fetch while a thread takes so many inputs, with so many multiply-adds for each.
  Stream far(int64_t inputs, int64_t products) const {
    return errand == nullptr ? Stream{} : errand->next(inputs, products);
  }
};

// A chunk of rows with its packed groups, for products with panels and with tiles.
struct Chunk {
  Rows rows;
  const float* packed;
  Cut cut;
};

inline bool in_tiles(const LinearCall& linear) {
  return kHasTiles && are_tiles(linear.matrix->storage);
}

// Rows that the sums of one panel have room for.
inline int64_t room_of(const LinearCall& linear, const Chunk& chunk) {
  return in_tiles(linear) ? chunk.cut.groups.room() : chunk.rows.count;
}

// What to fetch meanwhile of the slot-th segment of the layer's patch, or nothing.
inline Stream patch_piece(const LinearCall& linear, int64_t slot, const Rows& panels, int64_t steps,
                          const Stream& soon) {
  if (linear.patch == nullptr || slot >= linear.patch->count) return {soon.at, 0, 0};
  return piece_of(linear.patch->segments()[slot], panels, steps);
}

// The lines of the layer's patch that some rows read upon some panels: each turn has its share of
// the segments.
inline Lines lines_of_patch(const LinearCall& linear, const Rows& rows, const Rows& panels,
                            int64_t turn, int64_t turns) {
  const int64_t segments = linear.patch == nullptr ? 0 : linear.patch->count;
  const auto each = [&](auto&& body) {
    for (int64_t s = turn; s < segments; s += turns) {
      const Segment& segment = linear.patch->segments()[s];
      if (segment.last <= rows.first || segment.first >= rows.first + rows.count) continue;
      const Stream piece = piece_of(segment, panels, 1);
      for (int64_t at = 0; at < piece.pace; at += 64) body(piece.at + at);
    }
  };
  int64_t count = 0;
  each([&](const char*) { ++count; });
  if (count == 0) return {};
  auto** lines = scratch<kLines, const char*>(count);
  each([&, next = lines](const char* line) mutable { *next++ = line; });
  return {lines, count};
}

// Brings in the lines of one panel's results, which a large batch has pushed out of the caches: to
// write a line is to read it first.
inline void fetch_target(const LinearCall& linear, int64_t panel, const Rows& rows) {
  for (int64_t r = rows.first; linear.out != nullptr && r < rows.first + rows.count; ++r) {
    const float* line = linear.out + r * linear.matrix->out + panel * kPanel;
    _mm_prefetch(line, _MM_HINT_T0);
    _mm_prefetch(line + 16, _MM_HINT_T0);
  }
}

// sums[panel][row][kPanel] of `panels`, which are read together, for one chunk of rows. Meanwhile
// the next run is fetched, a share by each group, the patch's pieces, one by each group and run,
// and what the threads' errand wants.
template <class T, class Source>
void multiply(const Projection& p, const LinearCall& linear, const Rows& panels, const Chunk& chunk,
              float* sums) {
  const Matrix& m = *linear.matrix;
  const int64_t rows = chunk.rows.count, groups = groups_of(rows);
  const int64_t most = panels_per_tile(ceil_div(rows, groups)), tiles = ceil_div(panels.count, most);
  const Source source(m, panels, most, groups);
  for (int64_t i = 0; i < source.runs(); ++i) {
    const Rows taken = source.run(i), run = source.inputs(taken);
    for (int64_t t = 0; t < tiles; ++t) {
      const Rows tile{t * most, std::min(most, panels.count - t * most)};
      const auto laid = source.take(taken, tile);
      for (int64_t g = 0; g < groups; ++g) {
        const Rows group = part(rows, groups, g);
        const Stream soon = source.next(taken, tile, g);
        const Stream later =
            patch_piece(linear, (i * tiles + t) * groups + g, panels, run.count, soon);
        if (p.writes_many()) {
          const Rows some = part(group.count, source.runs(), i);
          fetch_target(linear, panels.first + tile.first,
                       {chunk.rows.first + group.first + some.first, some.count});
        }
        tile_for<T>(group.count, tile.count)(
            {chunk.packed + group.first * m.in + run.first * group.count, laid, run.count,
             sums + (tile.first * rows + group.first) * kPanel, rows * kPanel, i == 0,
             soon, later, {}, p.far(run.count, group.count * tile.count * kPanel)});
      }
    }
  }
}

// What `multiply` gives, of a matrix of codes.
inline void multiply_codes(const Projection& p, const LinearCall& linear, const Rows& panels,
                           const Chunk& chunk, float* sums) {
  const Rows& rows = chunk.rows;
  if (p.writes_many()) fetch_target(linear, panels.first, rows);
  const GroupedCall call{*linear.matrix, panels,
                         rows.count,     chunk.packed,
                         p.group_sums == nullptr ? nullptr : p.group_sums + rows.first, p.call.rows};
  if (linear.matrix->storage == Storage::kInt8) {
    multiply_groups<Int8>(call, sums);
  } else {
    multiply_groups<Int4>(call, sums);
  }
}

template <class T, class Source>
void multiply_each(const Projection& p, const LinearCall& linear, const Rows& panels,
                   const Chunk& chunk, float* sums) {
  const int64_t rows = chunk.rows.count, tile = panels_per_tile(ceil_div(rows, groups_of(rows)));
  for (int64_t at = 0; at < panels.count;) {
    const Rows left{panels.first + at, panels.count - at};
    const Rows some = Source::together(*linear.matrix, left, tile);
    multiply<T, Source>(p, linear, some, chunk, sums + at * rows * kPanel);
    at += some.count;
  }
}

// The same of any number of panels, of any storage.
inline void multiply_panels(const Projection& p, const LinearCall& linear, const Rows& panels,
                            const Chunk& chunk, float* sums) {
  const Storage storage = linear.matrix->storage;
  if (storage == Storage::kFolded)
    return multiply_each<BFloat16, FoldedPanelRuns>(p, linear, panels, chunk, sums);
  if (!is_grouped(storage))
    return with_storage(storage, [&](auto type) {
      multiply_each<decltype(type), PanelRuns<decltype(type)>>(p, linear, panels, chunk, sums);
    });
  const int64_t rows = chunk.rows.count, tallest = ceil_div(rows, groups_of(rows));
  for (int64_t at = 0; at < panels.count;) {
    const Rows some{panels.first + at, tile_panels(tallest, panels.count - at)};
    multiply_codes(p, linear, some, chunk, sums + at * rows * kPanel);
    at += some.count;
  }
}

// What some rows of a layer end in, once products and low-rank pieces are summed.
struct Ending {
  int64_t last;  // of the rows that it holds for
  const float* gain;
  const float* bias;
};

inline Ending ending_of(const LinearCall& linear, int64_t row) {
  const Patch* patch = linear.patch;
  if (patch == nullptr || patch->finish_count == 0) return {INT64_MAX, nullptr, linear.bias};
  const Finish* end = patch->finishes() + patch->finish_count;
  const Finish* finish = run_from(patch->finishes(), patch->finish_count, row);
  if (!holds(finish, end, row))
    return {finish == end ? INT64_MAX : finish->first, nullptr, linear.bias};
  return {finish->last, finish->gain, finish->bias != nullptr ? finish->bias : linear.bias};
}

// Gains and biases of one panel's sums [row][kPanel], `columns` of which count.
inline void end_panel(const LinearCall& linear, int64_t panel, const Rows& chunk, float* sums) {
  const int64_t column = panel * kPanel, columns = std::min(kPanel, linear.matrix->out - column);
  const int64_t last = chunk.first + chunk.count;
  for (int64_t row = chunk.first; row < last;) {
    const Ending ending = ending_of(linear, row);
    if (ending.gain == nullptr && ending.bias == nullptr) row = std::min(ending.last, last);
    for (; row < std::min(ending.last, last); ++row) {
      float* y = sums + (row - chunk.first) * kPanel;
      if (ending.gain != nullptr)
        for (int64_t c = 0; c < columns; ++c) y[c] *= ending.gain[column + c];
      if (ending.bias != nullptr)
        for (int64_t c = 0; c < columns; ++c) y[c] += ending.bias[column + c];
    }
  }
}

// What the i-th linear layer of the call gives for some panels and one chunk of rows, whole:
// sums[panel][row][kPanel], with the room of `room_of`.
inline void compute(const Projection& p, int64_t i, const Rows& panels, const Chunk& chunk,
                    float* sums) {
  const LinearCall& linear = p.call.linears[i];
  const int64_t room = room_of(linear, chunk);
  if (in_tiles(linear)) {
    multiply_tiles(*linear.matrix, panels, chunk.cut, sums,
                   [&](const Rows& some, int64_t turn, int64_t turns) {
                     return lines_of_patch(linear, chunk.rows, some, turn, turns);
                   },
                   [&](int64_t inputs, int64_t products) { return p.far(inputs, products); });
  } else {
    multiply_panels(p, linear, panels, chunk, sums);
  }
  for (int64_t s = 0; linear.patch != nullptr && s < linear.patch->count; ++s) {
    const Segment& segment = linear.patch->segments()[s];
    with_storage(segment.b_storage, [&](auto type) {
      expand<decltype(type)>(segment, panels, chunk.rows, p.shrunk[i], sums, room * kPanel);
    });
  }
  for (int64_t at = 0; at < panels.count; ++at)
    end_panel(linear, panels.first + at, chunk.rows, sums + at * room * kPanel);
}

}  // namespace blockllm
