// bfloat16 weights in little more than three quarters of their bytes, without loss.
//
// The weights of a matrix differ little in size, so nearly all of a block of kBlock of them have one
// of 16 high bytes (a sign and seven of the eight bits of an exponent). A block lists these, and the
// few weights that have others; then come pieces of 2 * kBytes weights: for each the number of its
// high byte, in 4 bits, and its low byte.
//
// A folded matrix is bundles of a few panels, on cache lines: the first block of each panel, the
// second ones and so on, so that several panels are read as one stream; where a block has too many
// other weights, the bundle's panels one behind the other, as they lie unfolded. Before them stands
// where they begin, int64 [bundles + 1] in bytes, the lowest bit set if the bundle is of blocks.
// Products unfold them in registers (unfold.h), or a few blocks at a time, in the order of panels
// (panel.h) or tiles (tiles.h), which they multiply from the first-level cache.
#pragma once
#include <algorithm>
#include <cstring>

#include "tiles.h"
#include "unfold.h"

namespace blockllm {

inline bool is_folded(Storage storage) {
  return storage == Storage::kFolded || storage == Storage::kFoldedTiles;
}

inline int64_t blocks_of(int64_t in) { return ceil_div(in, kBlockInputs); }

// Folds a block; false where it has too many others.
template <class Order>
bool fold_block(const uint16_t* weights, char* block) {
  int32_t counts[256] = {};
  for (int64_t i = 0; i < kBlock; ++i) ++counts[weights[i] >> 8];
  uint8_t by_count[256];
  for (int i = 0; i < 256; ++i) by_count[i] = static_cast<uint8_t>(i);
  std::partial_sort(by_count, by_count + 16, by_count + 256, [&](uint8_t a, uint8_t b) {
    return counts[a] != counts[b] ? counts[a] > counts[b] : a < b;
  });
  BlockHead head = {};
  for (BlockHead::Other& other : head.other) other.weight = weights[0];
  std::copy(by_count, by_count + 16, head.high);
  uint8_t numbers[256];
  std::memset(numbers, 16, sizeof numbers);
  for (uint8_t i = 0; i < 16; ++i) numbers[head.high[i]] = i;
  char* at = block + sizeof head;
  std::memset(at, 0, static_cast<size_t>(kPieces * kPieceBytes));
  for (int64_t vector = 0; vector < kBlock / kVector; ++vector) {
    char* piece = at + vector / 4 * kPieceBytes;
    const int64_t half = vector / 2 % 2;
    for (int64_t i = 0; i < kVector; ++i) {
      const int64_t place = Order::place(vector) + i, byte = i / 8 * 16 + vector % 2 * 8 + i % 8;
      const uint16_t weight = weights[place];
      int number = numbers[weight >> 8];
      if (number == 16) {
        if (head.others == BlockHead::kMost) return false;
        head.other[head.others++] = {static_cast<uint16_t>(place), weight};
        number = 0;
      }
      piece[byte] = static_cast<char>(piece[byte] | number << 4 * half);
      piece[(1 + half) * kBytes + byte] = static_cast<char>(weight & 0xff);
    }
  }
  std::memcpy(block, &head, sizeof head);
  return true;
}

// Bytes of a panel as it lies unfolded.
template <class Order>
int64_t unfolded_bytes(int64_t in);
template <>
inline int64_t unfolded_bytes<PanelOrder>(int64_t in) {
  return ceil_div(in * kPanel * 2, 64) * 64;
}
template <>
inline int64_t unfolded_bytes<TileOrder>(int64_t in) {
  return steps_of(in) * kStepWeights * 2;
}

// Panels of a bundle: so many that bundles come out whole and even in number, if that can be.
inline int64_t bundle_of(int64_t panels) {
  for (const int64_t size : {4, 3, 2})
    if (panels % (2 * size) == 0) return size;
  return 4;
}

// Where the bundles of a folded matrix lie.
class Bundles {
 public:
  explicit Bundles(const Matrix& m)
      : panels_(panels_of(m.out)),
        size_(bundle_of(panels_)),
        data_(static_cast<const char*>(m.data)),
        starts_(static_cast<const int64_t*>(m.data)) {}

  int64_t count() const { return ceil_div(panels_, size_); }
  // Bytes of what says where they begin.
  int64_t head_bytes() const { return ceil_div((count() + 1) * int64_t{sizeof(int64_t)}, 64) * 64; }
  // The bundle that has a panel, and the panels of a bundle.
  int64_t with(int64_t panel) const { return panel / size_; }
  Rows panels(int64_t bundle) const {
    const int64_t first = bundle * size_;
    return {first, std::min(size_, panels_ - first)};
  }
  bool is_folded(int64_t bundle) const { return (starts_[bundle] & 1) != 0; }
  int64_t offset(int64_t bundle) const { return starts_[bundle] & ~int64_t{1}; }
  const char* at(int64_t bundle) const { return data_ + offset(bundle); }

 private:
  const int64_t panels_, size_;
  const char* const data_;
  const int64_t* const starts_;
};

// Of some panels, the first that are of one bundle.
inline Rows panels_together(const Matrix& m, const Rows& panels) {
  const Bundles bundles(m);
  const Rows all = bundles.panels(bundles.with(panels.first));
  return {panels.first, std::min(all.first + all.count - panels.first, panels.count)};
}

// Some panels of one bundle, read by runs of blocks.
template <class Order>
class Unfolding {
 public:
  Unfolding(const Matrix& m, const Rows& panels)
      : Unfolding(Bundles(m), panels, unfolded_bytes<Order>(m.in)) {}

  // The share of one of the panels, by its place among them, in `count` blocks from one on, as
  // they lie: in one stream with those of the others where they are folded.
  const char* share(int64_t block, int64_t count, int64_t panel) const {
    return at_ + block * step_ + panel * (is_folded_ ? count * kBlockBytes : whole_);
  }
  // Bytes from a panel's block to its next one.
  int64_t step() const { return step_; }
  // Bytes of a panel's block, and from the next panel's share of so many to the one behind it.
  int64_t block_bytes() const { return is_folded_ ? kBlockBytes : kBlock * 2; }
  int64_t share_apart(int64_t bytes) const { return is_folded_ ? bytes : whole_; }
  // Of what `tile` panels read, where one has `bytes`, the bytes that one stream of it has.
  int64_t share_bytes(int64_t bytes, int64_t tile) const {
    return is_folded_ ? bytes * tile : bytes;
  }

  // What a panel has from a block on, as it lies: folded, or not.
  Laid<uint16_t> lies(int64_t block, int64_t panel) const {
    const char* at = share(block, 1, panel);
    if (is_folded_) return {nullptr, 0, {at, step_}};
    return {reinterpret_cast<const uint16_t*>(at), 0};
  }

  // The weights that some of the panels have in some blocks. Meanwhile lines `ahead` bytes behind
  // them are fetched.
  Laid<uint16_t> take(const Rows& blocks, const Rows& panels, int64_t ahead) const {
    if (!is_folded_) {
      const char* at = at_ + panels.first * whole_ + blocks.first * block_bytes();
      return {reinterpret_cast<const uint16_t*>(at), whole_ / 2};
    }
    auto* const to = scratch<kUnfolded, uint16_t>(panels.count * blocks.count * kBlock);
    for (int64_t b = 0; b < blocks.count; ++b)
      for (int64_t p = 0; p < panels.count; ++p)
        unfold_block<Order>(at_ + (blocks.first + b) * step_ + (panels.first + p) * kBlockBytes,
                            ahead, to + (p * blocks.count + b) * kBlock);
    return {to, blocks.count * kBlock};
  }

 private:
  Unfolding(const Bundles& bundles, const Rows& panels, int64_t whole) : whole_(whole) {
    const int64_t bundle = bundles.with(panels.first);
    const Rows all = bundles.panels(bundle);
    is_folded_ = bundles.is_folded(bundle);
    step_ = is_folded_ ? all.count * kBlockBytes : kBlock * 2;
    at_ = bundles.at(bundle) + (panels.first - all.first) * (is_folded_ ? kBlockBytes : whole);
  }

  const int64_t whole_;
  const char* at_;
  int64_t step_;
  bool is_folded_;
};

}  // namespace blockllm
