// How a call is divided, and its jobs: the few panels at a time that the layers of it are computed
// by, for one chunk of rows.
#pragma once
#include "activation.h"
#include "projection.h"

namespace blockllm {

// Rows of a chunk for tiles: as many as the second-level cache holds beside their sums, and so few
// that each thread has its own; but fewer than kManyRows only if all have, since every chunk reads
// the weights again.
constexpr int64_t kCutBytes = 1 << 20;
constexpr int64_t kFewestRows = 32, kOwnRows = 64, kManyRows = 128, kMostRows = 256;

inline int64_t chunks_of(const ProjectCall& call, bool has_tiles, int64_t threads) {
  const int64_t rows = call.rows;
  if (!has_tiles) {
    const int64_t chunks = rows <= kOneChunk ? 1 : ceil_div(rows, kChunk);
    return chunks < threads ? chunks : ceil_div(chunks, threads) * threads;  // as many for each
  }
  const int64_t least = rows >= threads * kOwnRows ? kOwnRows : kManyRows;
  const int64_t most = std::clamp(ceil_div(rows, threads), least, kMostRows);
  const int64_t row_bytes = Groups(1, pieces_of(call)).size(call.width) * 2;
  return ceil_div(rows, std::clamp(kCutBytes / row_bytes / 32 * 32, kFewestRows, most));
}

// How many panels a task computes: enough sums to hide latencies, few enough to share them out, and
// of tiles, which hide them better, as many for each thread.
inline int64_t panels_per_job(const ProjectCall& call, bool has_panels, int64_t threads) {
  if (has_panels) return call.rows <= 8 ? 4 : call.rows <= 32 ? 2 : 1;
  const int64_t most = threads * (call.rows <= 8 ? 4 : 1);
  const int64_t panels = panels_of(call.linears[0].matrix->out);
  return ceil_div(panels, threads * ceil_div(panels, most));
}

// Whether a task computes a whole bundle of folded panels, which are read as one stream: of few
// rows, or where each thread has several.
inline bool has_whole_bundles(const ProjectCall& call, int64_t threads) {
  int64_t bundles = 0;
  for (int64_t i = call.mode == Mode::kGate ? 1 : 0; i < call.count; ++i)
    bundles += Bundles(*call.linears[i].matrix).count();
  return call.rows <= 8 || bundles >= 2 * threads;
}

inline Projection projection_of(const ProjectCall& call, int64_t threads) {
  const LinearCall* end = call.linears + call.count;
  const bool has_tiles = std::any_of(call.linears, end, in_tiles);
  const bool has_panels = !std::all_of(call.linears, end, in_tiles);
  const int64_t chunks = chunks_of(call, has_tiles, threads);
  const int64_t panels = panels_per_job(call, has_panels, threads);
  const bool shrinks_cut = !has_panels && shrinks_as_cut(call);
  const bool whole = has_whole_bundles(call, threads);
  const float* plain = call.norm.kind == NormKind::kNone ? call.x : nullptr;
  return {call, chunks, panels, has_panels, has_tiles, shrinks_cut, whole, plain};
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
inline void apply_gate(Act kind, const float* gate, int64_t count, float* sums) {
  with_act(kind, [&](auto act_kind) {
    for (int64_t i = 0; i < count; i += kLanes)
      store(sums + i, mul(act<decltype(act_kind)::value>(load(gate + i)), load(sums + i)));
  });
}

// Jobs: the few panels at a time that the layers of a call are computed by, one after the other.
// Where the call has a gate, the panels of `up` are computed with those of the gate.
struct Jobs {
  const Projection& p;
  uint16_t* const pieces;  // where the results of the last layer are cut to; null: they are written
  int64_t first;           // layer

  explicit Jobs(const Projection& projection, uint16_t* cut_to = nullptr)
      : p(projection), pieces(cut_to), first(projection.call.mode == Mode::kGate ? 1 : 0) {}

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

  void write(const LinearCall& linear, int64_t panel, const Chunk& chunk, const float* sums) const {
    const Rows& rows = chunk.rows;
    static_assert(!kHasTiles || kPanel == kDepth);
    if (p.bests) {
      const int64_t column = panel * kPanel;
      return p.bests.take(Pool::thread(), rows, column,
                          std::min(kPanel, linear.matrix->out - column), sums);
    }
    if (pieces != nullptr)
      return cut_column(chunk.cut.groups, panel * kPanel, sums, linear.matrix->out, pieces);
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
      write(linear, begin + q, chunk, sums);
    }
  }
};

}  // namespace blockllm
