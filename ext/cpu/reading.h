// How products read the weights of some panels: a run of inputs at a time, as they are stored or
// unfolded. A source tells its i-th run, in units of its own, once; with that what a tile reads in it.
// What it divides, it divides when it is made.
#pragma once
#include "folded.h"
#include "tile.h"

namespace blockllm {

// Inputs per pass, in bytes of a panel: it stays near while groups of rows pass.
constexpr int64_t kRunBytes = kLanes == 8 ? 32 << 10 : 16 << 10;
// So many steps of a panel stay in the first-level cache while many groups of rows pass. Of rows in
// several pieces, more is multiplied per load, and whole panels are.
constexpr int64_t kRunSteps = 10;

// What is read as it is stored.
struct Stored {
  // The panels that are read together, of some of a matrix from the first on: those of a tile.
  static Rows together(const Matrix&, const Rows& panels, int64_t tile) {
    return {panels.first, std::min(tile, panels.count)};
  }
};

// Some panels of a matrix as they are stored, of which one tile is multiplied at a time.
template <class T>
class PanelRuns : public Stored {
  using Element = typename T::Element;

 public:
  // For tiles of so many panels, and groups of rows.
  PanelRuns(const Matrix& m, const Rows& panels, int64_t, int64_t groups)
      : weights_(static_cast<const Element*>(m.data) + panels.first * m.in * kPanel),
        in_(m.in),
        runs_(groups == 1 ? 1 : ceil_div(in_, kRunBytes / kInputBytes)),
        pace_(groups == 1 ? 0 : ceil_div(kInputBytes, groups)) {}

  int64_t runs() const { return runs_; }
  Rows run(int64_t i) const { return part(in_, runs_, i); }
  Rows inputs(const Rows& run) const { return run; }
  // The weights that a tile's panels have in a run.
  Laid<Element> take(const Rows& run, const Rows& tile) const {
    return {weights_ + run.first * kPanel + tile.first * in_ * kPanel, in_ * kPanel};
  }
  // What to fetch while the g-th group of rows passes some panels of a run.
  Stream next(const Rows& run, const Rows&, int64_t g) const {
    const char* from = reinterpret_cast<const char*>(weights_ + run.first * kPanel);
    if (pace_ == 0) return {from + kAhead, kInputBytes, in_ * kInputBytes};
    return {from + run.count * (kInputBytes + g * pace_), pace_, 0};
  }

 private:
  static constexpr int64_t kInputBytes = kPanel * sizeof(Element);

  const Element* const weights_;
  const int64_t in_, runs_, pace_;
};

// Tiles, whose runs are of steps: as they are stored.
class TileRuns : public Stored {
 public:
  TileRuns(const Matrix& m, const Rows& panels, int64_t, int64_t turns)
      : steps_(steps_of(m.in)),
        runs_(turns == 1 ? 1 : ceil_div(steps_, kRunSteps)),
        weights_(static_cast<const uint16_t*>(m.data) + panels.first * steps_ * kStepWeights) {}

  int64_t runs() const { return runs_; }
  Rows run(int64_t i) const { return part(steps_, runs_, i); }
  Laid<uint16_t> take(const Rows& run, const Rows& tile) const {
    const int64_t apart = steps_ * kStepWeights;
    return {weights_ + run.first * kStepWeights + tile.first * apart, apart};
  }
  // `pace` is of steps.
  Stream next(const Rows& run, const Rows&) const {
    const char* from = reinterpret_cast<const char*>(weights_ + run.first * kStepWeights);
    return {runs_ == 1 ? from + kAhead : from + run.count * kStepBytes, kStepBytes,
            steps_ * kStepBytes};
  }

 private:
  static constexpr int64_t kStepBytes = kStepWeights * sizeof(uint16_t);

  const int64_t steps_, runs_;
  const uint16_t* const weights_;
};

// Blocks of a run, for tiles of several panels and of one; and what unfolding for the former, which
// wait for memory, fetches ahead, in bytes.
constexpr int64_t kBlocksOfSeveral = 4, kBlocksOfOne = 8;
constexpr int64_t kUnfoldAhead = 5 * kBlockBytes;

// A bundle's panels, folded, or some of them, in runs of blocks. A run's part of a tile is unfolded
// when that tile is next, or in registers as it is multiplied, if tiles are of one panel; meanwhile
// the next run of them all is fetched as it lies.
template <class Order>
class FoldedRuns {
 public:
  static Rows together(const Matrix& m, const Rows& panels, int64_t) {
    return panels_together(m, panels);
  }

  FoldedRuns(const Matrix& m, const Rows& panels, int64_t tile, bool in_registers)
      : unfolding_(m, panels),
        blocks_(blocks_of(m.in)),
        runs_(ceil_div(blocks_ * tile, tile > 1 ? kBlocksOfSeveral : kBlocksOfOne)),
        ahead_(tile > 1 ? kUnfoldAhead : 0),
        in_registers_(in_registers && tile == 1) {}

  int64_t runs() const { return runs_; }
  Rows run(int64_t i) const { return part(blocks_, runs_, i); }
  Laid<uint16_t> take(const Rows& run, const Rows& tile) const {
    if (in_registers_) return unfolding_.lies(run.first, tile.first);
    return unfolding_.take(run, tile, ahead_);
  }

 protected:
  // A tile's share of the next run: for each input or pair of inputs of a panel it has `bytes`, for
  // each unit of its pace `times` as much.
  Stream soon(const Rows& run, const Rows& tile, int64_t bytes, int64_t times = 1) const {
    return {unfolding_.share(run.first + run.count, run.count, tile.first),
            unfolding_.share_bytes(bytes, tile.count) * times, unfolding_.share_apart(bytes)};
  }
  int64_t block_bytes() const { return unfolding_.block_bytes(); }

 private:
  const Unfolding<Order> unfolding_;
  const int64_t blocks_, runs_, ahead_;
  const bool in_registers_;
};

class FoldedPanelRuns : public FoldedRuns<PanelOrder> {
 public:
  FoldedPanelRuns(const Matrix& m, const Rows& panels, int64_t tile, int64_t groups)
      : FoldedRuns(m, panels, tile, groups <= kGroupsInRegisters),
        in_(m.in),
        pace_(ceil_div(block_bytes(), kBlockInputs * groups)) {}

  Rows inputs(const Rows& run) const {
    const int64_t first = run.first * kBlockInputs;
    return {first, std::min(run.count * kBlockInputs, in_ - first)};
  }
  Stream next(const Rows& run, const Rows& tile, int64_t g) const {
    Stream next = soon(run, tile, pace_);
    next.at += g * pace_ * inputs(run).count;
    return next;
  }

 private:
  const int64_t in_, pace_;
};

class FoldedTileRuns : public FoldedRuns<TileOrder> {
 public:
  FoldedTileRuns(const Matrix& m, const Rows& panels, int64_t tile, int64_t turns)
      : FoldedRuns(m, panels, tile, turns <= kTurnsInRegisters) {}

  Stream next(const Rows& run, const Rows& tile) const {
    return soon(run, tile, block_bytes() / (kDepth / 2), kDepth / 2);
  }
};

// Where some panels of a matrix lie in its memory, in bytes.
inline Rows bytes_of(const Matrix& m, const Rows& panels) {
  const int64_t last = panels.first + panels.count;
  if (is_folded(m.storage)) {
    const Bundles bundles(m);
    const int64_t first = bundles.offset(bundles.with(panels.first));
    return {first, bundles.offset(bundles.with(last - 1) + 1) - first};
  }
  const int64_t each = m.storage == Storage::kTiles
                           ? unfolded_bytes<TileOrder>(m.in)
                           : m.in * kPanel * element_bytes(m.storage);
  return {each * panels.first, each * panels.count};
}

}  // namespace blockllm
