// The largest result of each row, found while results are made, a few panels at a time: nobody
// writes the others, nor reads them again.
#pragma once
#include <algorithm>
#include <limits>

#include "chunk.h"
#include "panel.h"

namespace blockllm {

// A result of a row and its place among them.
struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int64_t place = 0;
};

// Of equal ones the first counts, of NaNs none.
inline bool before(const Best& one, const Best& other) {
  return one.value > other.value || (one.value == other.value && one.place < other.place);
}

// What each thread has found of each row.
class Bests {
 public:
  Bests() = default;
  // In memory for `size` of them.
  Bests(Best* memory, int64_t rows, int64_t threads)
      : all_(memory), rows_(rows), apart_(apart(rows)), threads_(threads) {
    std::fill(all_, all_ + threads_ * apart_, Best{});
  }
  static int64_t size(int64_t rows, int64_t threads) { return threads * apart(rows); }

  explicit operator bool() const { return all_ != nullptr; }

  // Takes in the results at the places from `first` on of some rows: [row][kPanel], `count` of each.
  void take(int64_t thread, const Rows& rows, int64_t first, int64_t count, const float* x) const {
    Best* own = all_ + thread * apart_ + rows.first;
    for (const Best* end = own + rows.count; own < end; ++own, x += kPanel) {
      if (count == kPanel && first > own->place) {
        const Vec bound = fill(own->value);
        if ((greater(load(x), bound) | greater(load(x + kLanes), bound)) == 0) continue;
      }
      for (int64_t c = 0; c < count; ++c) {
        const Best one{x[c], first + c};
        if (before(one, *own)) *own = one;
      }
    }
  }

  // The place of each row's best.
  void write(int64_t* places) const {
    for (int64_t row = 0; row < rows_; ++row) {
      Best best = all_[row];
      for (int64_t thread = 1; thread < threads_; ++thread) {
        const Best& one = all_[thread * apart_ + row];
        if (before(one, best)) best = one;
      }
      places[row] = best.place;
    }
  }

 private:
  // From thread to thread: no two share a line.
  static int64_t apart(int64_t rows) { return ceil_div(rows, 4) * 4; }

  Best* all_ = nullptr;
  int64_t rows_ = 0, apart_ = 0, threads_ = 0;
};

}  // namespace blockllm
