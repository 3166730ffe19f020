// How weights lie in tiles for processors that multiply bfloat16 by bfloat16 and sum in float32
// (amx.h, dots.h), and what those compute at once.
//
// Panels of kPanel outputs, each [inputs / 32][2 tiles][16 pairs of inputs][16 outputs][2], padded
// with zeros: a step of kDepth inputs of a panel is 2 KiB that one product after the other reads in
// order.
#pragma once
#include "chunk.h"
#include "panel.h"
#include "tile.h"
#include "unfold.h"

namespace blockllm {

constexpr int64_t kDepth = 32;                      // inputs of a tile
constexpr int64_t kTileWeights = 16 * kDepth;       // 16 outputs
constexpr int64_t kStepWeights = 2 * kTileWeights;  // kDepth inputs of a panel
constexpr int64_t kSide = 16;                       // of a square of sums
constexpr int64_t kSquare = kSide * kSide;
// Up to how many groups of rows unfold a tile in registers, each for itself, instead of once into
// memory.
constexpr int64_t kTurnsInRegisters = 8;

#if defined(__AMX_BF16__)
// Rows in three pieces are multiplied faster than by float32 units: all weights lie in tiles.
constexpr bool kHasTiles = true, kExactInTiles = true;
constexpr int64_t kHeight = 16;       // rows of a group, at most
constexpr int64_t kGroupsAtOnce = 2;  // that a run multiplies
// Whether results of many rows are written to memory, past the caches. They would push out what is
// read; but where products take longer, the next call finds them in the last cache.
constexpr bool kPassesCaches = true;
#elif defined(__AVX512BF16__)
constexpr bool kHasTiles = true, kExactInTiles = false;
constexpr int64_t kHeight = kTileRows;
constexpr int64_t kGroupsAtOnce = 1;
constexpr bool kPassesCaches = false;
#else
constexpr bool kHasTiles = false, kExactInTiles = false;
constexpr int64_t kHeight = kTileRows;
constexpr int64_t kGroupsAtOnce = 1;
constexpr bool kPassesCaches = false;
#endif

inline int64_t steps_of(int64_t in) { return ceil_div(in, kDepth); }
// Inputs with those that fill the last tile.
inline int64_t padded(int64_t in) { return steps_of(in) * kDepth; }

// Where the weight of output c of a panel and input k lies within the panel.
inline int64_t tile_place(int64_t c, int64_t k) {
  return k / kDepth * kStepWeights + c / 16 * kTileWeights + k % kDepth / 2 * 32 + c % 16 * 2 +
         k % 2;
}

inline bool are_tiles(Storage storage) {
  return storage == Storage::kTiles || storage == Storage::kFoldedTiles;
}

// Lines of memory to fetch.
struct Lines {
  const char* const* at = nullptr;
  int64_t count = 0;
};

// What groups of rows in pieces, kGroupsAtOnce or the last one, do with a run of some panels (of
// one, where there are several groups): sums (+)= pieces times weights.
struct TileRun {
  const uint16_t* rows;
  int64_t apart;  // elements from a group to the next one
  int64_t height;
  Laid<uint16_t> weights;
  int64_t steps, panels;
  float* sums;          // of a group [height][kPanel], those of the next behind them
  int64_t sums_stride;  // floats from panel to panel
  bool begins;          // sums begin at zero
  Stream soon;          // to fetch meanwhile, its pace by steps
  int64_t lines;        // of one panel: so many of 64 bytes per piece
  Lines later;  // and these, spread over the run
  Stream far;   // and into the second-level cache
};

// Fetches what a run of tiles wants, a share at a time, but the first `others` lines of each share
// of its stream, which others fetch.
template <int PIECES>
class Fetching {
 public:
  explicit Fetching(const TileRun& run, int64_t others = 0)
      : lines_(run.lines - others),
        apart_(run.lines * 64),
        soon_(run.soon.at + others * 64),
        later_(run.later.at),
        end_(run.later.at + run.later.count),
        pace_(run.later.count == 0 ? 0 : ceil_div(run.later.count, run.steps * PIECES)),
        far_(run.far.at),
        far_end_(far_),
        far_pace_(ceil_div(run.far.pace * kDepth, PIECES)) {}

  template <_mm_hint HINT>
  void next() {
    for (int64_t i = 0; i < lines_; ++i) _mm_prefetch(soon_ + i * 64, HINT);
    soon_ += apart_;
    for (int64_t i = 0; i < pace_ && later_ < end_; ++i) _mm_prefetch(*later_++, _MM_HINT_T0);
    far_end_ += far_pace_;
    for (; far_ < far_end_; far_ += 64) _mm_prefetch(far_, _MM_HINT_T1);
  }

 private:
  const int64_t lines_, apart_;
  const char* soon_;
  const char* const* later_;
  const char* const* end_;
  const int64_t pace_;
  const char *far_, *far_end_;
  const int64_t far_pace_;
};

// out[stripe][32][16] = two tiles of 16 rows, each times the tiles of one or two stripes, summed
// over steps.
struct Squares {
  const uint16_t* rows[2];
  int64_t stride;              // bytes from row to row
  int64_t apart;               // elements from step to step
  const uint16_t* stripes[2];  // [step][16 pairs][16][2]
  int64_t steps;
  float* out[2];
};

}  // namespace blockllm
