// How a block of folded bfloat16 weights (folded.h) lies in memory, and how it is unfolded: into
// memory, or two vectors at a time in registers, just before they are multiplied.
#pragma once
#include "chunk.h"
#include "panel.h"
#include "scratch.h"
#include "vec.h"

namespace blockllm {

constexpr int64_t kBlock = 1024;
constexpr int64_t kBlockInputs = kBlock / kPanel;
constexpr int64_t kBytes = sizeof(Vec);
constexpr int64_t kVector = kBytes / 2;  // weights
constexpr int64_t kPairs = kBlock / (2 * kVector);
constexpr int64_t kPieceBytes = 3 * kBytes, kPieces = kPairs / 2;

struct BlockHead {
  struct Other {
    uint16_t place, weight;  // among the unfolded ones
  };
  static constexpr int64_t kMost = 11;

  uint8_t high[16];
  uint32_t others;
  Other other[kMost];
};
static_assert(sizeof(BlockHead) == 64);

constexpr int64_t kBlockBytes = sizeof(BlockHead) + kPieces * kPieceBytes;

// Where the vectors of a block lie unfolded, in the order in which they are folded: for panels, and
// for tiles (tiles.h), of which a block is a step.
struct PanelOrder {
  static constexpr int64_t place(int64_t vector) { return vector * kVector; }
};
struct TileOrder {
  static constexpr int64_t place(int64_t vector) {
    return vector / 2 * kVector + vector % 2 * (kBlock / 2);
  }
};

// A block that is read as it lies folded: of others there may be none.
class FoldedBlock {
 public:
  explicit FoldedBlock(const char* block)
      : table_(repeat_bytes(reinterpret_cast<const BlockHead*>(block)->high)),
        pieces_(block + sizeof(BlockHead)) {}

  // The vectors 2 i and 2 i + 1.
  [[gnu::always_inline]] void take(int64_t i, Bytes& first, Bytes& second) const {
    const char* at = pieces_ + i / 2 * kPieceBytes;
    const Bytes numbers = load_bytes(at), low = load_bytes(at + (1 + i % 2) * kBytes);
    const Bytes high = look_up(table_, i % 2 == 0 ? low_halves(numbers) : high_halves(numbers));
    first = pair_low(low, high);
    second = pair_high(low, high);
  }

 private:
  const Bytes table_;
  const char* const pieces_;
};

// Unfolds a block, and fetches what lies `ahead` bytes behind each line (0: nothing).
template <class Order>
[[gnu::always_inline]] inline void unfold_block(const char* block, int64_t ahead, uint16_t* to) {
  const auto& head = *reinterpret_cast<const BlockHead*>(block);
  const FoldedBlock folded(block);
  if (ahead != 0) _mm_prefetch(block + ahead, kOnce);
#pragma GCC unroll 32
  for (int64_t i = 0; i < kPairs; ++i) {
    if (ahead != 0 && i % 2 == 0)
      for (int64_t line = i / 2 * kPieceBytes / 64; line < (i / 2 + 1) * kPieceBytes / 64; ++line)
        _mm_prefetch(block + sizeof head + line * 64 + ahead, kOnce);
    Bytes first, second;
    folded.take(i, first, second);
    store_bytes(to + Order::place(2 * i), first);
    store_bytes(to + Order::place(2 * i + 1), second);
  }
  // Nearly every block has at most two; what is not one is as the weight that it names.
  to[head.other[0].place] = head.other[0].weight;
  to[head.other[1].place] = head.other[1].weight;
  for (uint32_t i = 2; i < head.others; ++i) to[head.other[i].place] = head.other[i].weight;
}

// Whether a block has no others, as nearly all have none.
inline bool is_regular(const char* block) {
  return reinterpret_cast<const BlockHead*>(block)->others == 0;
}

// A block in this thread's scratch.
template <class Order>
[[gnu::noinline]] const uint16_t* unfold_apart(const char* block) {
  auto* const to = scratch<kUnfolded, uint16_t>(kBlock);
  unfold_block<Order>(block, 0, to);
  return to;
}

// Blocks of a panel, folded, from each to the next `step` bytes.
struct Folded {
  const char* at = nullptr;
  int64_t step = 0;

  explicit operator bool() const { return at != nullptr; }
  const char* block(int64_t i) const { return at + i * step; }
};

// Weights of some panels: unfolded at `at`, from each panel to the next `apart` elements; or those
// of one panel, folded, where products unfold them in registers.
template <class Element>
struct Laid {
  const Element* at;
  int64_t apart;
  Folded folded = {};
};

}  // namespace blockllm
