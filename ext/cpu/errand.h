// What threads fetch while they multiply many rows: the pages that the next attention reads.
//
// Such products keep the cores busy and leave memory idle; attention of few queries is the other
// way round. So the lines of its pages are asked for between products, evenly, and pass through a
// core's second-level cache into the third, where attention finds them. Not all cores need share
// that one: each thread fetches what it is likely to read itself. Blocks of many rows compute longer
// than they wait: nothing is fetched for them.
#pragma once
#include <algorithm>

#include "attention.h"
#include "chunk.h"
#include "pool.h"
#include "scratch.h"
#include "tile.h"

namespace blockllm {

// Multiply-adds that leave time to fetch one line, at the least.
constexpr double kProductsPerLine = 512;
// Rows of a block that waits for its pages, at most.
constexpr int64_t kMostWaiting = 8;

class Errand {
 public:
  explicit Errand(int64_t threads) : threads_(threads) {}

  // From now on the pages of this call are fetched, during so many multiply-adds; at most so many
  // bytes.
  void begin(const AttendCall& call, double products, int64_t most) {
    page_bytes_ = 2 * call.page * call.kv_heads * call.dim * element_bytes(call.storage);
    const int64_t pages = list_pages(Attention<Float32>(call), most / page_bytes_ / threads_);
    const auto lines = static_cast<double>(pages * page_bytes_ / kLine);
    lines_per_product_ = std::min(lines / products, 1 / kProductsPerLine);
  }

  // From now on nothing is.
  void end() { shares_ = nullptr; }

  // Of this thread's share, what is to be fetched while it takes so many inputs, with so many
  // multiply-adds for each: bytes that lie together. Nothing once all are asked for.
  Stream next(int64_t inputs, int64_t products) {
    if (shares_ == nullptr) return {};
    Share& own = shares_[Pool::thread()];
    if (own.page == own.last) return {};
    own.due += lines_per_product_ * static_cast<double>(inputs * products);
    const int64_t left = page_bytes_ - own.done;
    const int64_t pace = std::min(static_cast<int64_t>(own.due) * kLine, left) / inputs;
    if (pace == 0 && left >= inputs) return {};
    const char* at = pages_[own.page] + own.done;
    const int64_t bytes = pace == 0 ? left : pace * inputs;
    own.due -= static_cast<double>(bytes) / kLine;
    own.done += bytes;
    if (own.done == page_bytes_) {
      ++own.page;
      own.done = 0;
    }
    return {at, std::max<int64_t>(pace, 1), 0};
  }

 private:
  static constexpr int64_t kLine = 64;

  // The pages [page, last) that a thread has not fetched, but for `done` bytes; so many lines are
  // due.
  struct alignas(64) Share {
    int64_t page, last, done;
    double due;
  };

  // Lists the pages of the blocks that each thread attends, in its order, of which it fetches so
  // many; how many these are in all.
  int64_t list_pages(const Attention<Float32>& a, int64_t most) {
    const AttendCall& call = a.call;
    const int64_t blocks = call.plan->blocks;
    const auto each = [&](auto&& body) {
      for (int64_t i = 0; i < blocks; ++i) {
        const Reach reach = a.reach(block_of(i, blocks, threads_));
        if (reach.last - reach.first > kMostWaiting) continue;
        const int32_t* pages = a.pages(reach.first);
        const int64_t last = a.position(reach.last - 1) / call.page;
        for (int64_t at = a.lowest(reach.first) / call.page; at <= last; ++at) body(i, pages[at]);
      }
    };
    int64_t count = 0, listed = 0, fetched = 0;
    each([&](int64_t, int64_t) { ++count; });
    if (count == 0) return 0;
    pages_ = scratch<kPages, const char*>(count);
    shares_ = scratch<kShares, Share>(threads_);
    for (int64_t thread = 0; thread < threads_; ++thread) shares_[thread] = {0, 0, 0, 0};
    each([&](int64_t i, int64_t page) {
      pages_[listed] = static_cast<const char*>(call.cache) + page * page_bytes_;
      Share& share = shares_[part_with(blocks, threads_, i)];
      if (share.last == 0) share.page = share.last = listed;
      ++listed;
      if (share.last - share.page == most) return;
      ++share.last;
      ++fetched;
    });
    return fetched;
  }

  const int64_t threads_;
  int64_t page_bytes_ = 0;
  double lines_per_product_ = 0;
  const char** pages_ = nullptr;
  Share* shares_ = nullptr;
};

}  // namespace blockllm
