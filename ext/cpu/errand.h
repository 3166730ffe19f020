// What threads fetch while they multiply many rows: the pages that the next attention reads.
//
// Such products keep the cores busy and leave memory idle; attention of few queries is the other
// way round. So the lines of its pages are asked for between products, evenly, and pass through a
// core's second-level cache into the third, where attention finds them. Not all cores need share
// that one: each thread fetches what it is likely to read itself.
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

class Errand {
 public:
  explicit Errand(int64_t threads) : threads_(threads) {}

  // From now on the pages of this call are fetched, during so many multiply-adds; at most so many
  // bytes.
  void begin(const AttendCall& call, double products, int64_t most) {
    const int64_t element = call.storage == Storage::kF32 ? 4 : 2;
    page_bytes_ = 2 * call.page * call.kv_heads * call.dim * element;
    list_pages(Attention<Float32>(call));
    share_pages(most);
    const double lines = static_cast<double>(count_ * page_bytes_ / kLine);
    lines_per_product_ = std::min(lines / products, 1 / kProductsPerLine);
  }

  // Of this thread's share, what is to be fetched while it takes so many inputs, with so many
  // multiply-adds for each: lines that lie together. Nothing once all are asked for.
  Stream next(int64_t inputs, int64_t products) {
    if (shares_ == nullptr) return {};
    Share& own = shares_[Pool::thread()];
    if (own.page == own.last) return {};
    own.due += lines_per_product_ * static_cast<double>(inputs * products);
    const auto lines = static_cast<int64_t>(own.due);
    own.due -= static_cast<double>(lines);
    const char* at = pages_[own.page] + own.done;
    const int64_t bytes = std::min(lines * kLine, page_bytes_ - own.done);
    own.done += bytes;
    if (own.done == page_bytes_) {
      ++own.page;
      own.done = 0;
    }
    return {at, ceil_div(bytes, inputs), 0};
  }

 private:
  static constexpr int64_t kLine = 64;

  // The pages [page, last) that a thread has not fetched, but for `done` bytes; so many lines are
  // due.
  struct alignas(64) Share {
    int64_t page, last, done;
    double due;
  };

  // Lists pages in the order of blocks, which attention shares out alike.
  void list_pages(const Attention<Float32>& a) {
    const AttendCall& call = a.call;
    const auto each = [&](auto&& body) {
      for (int64_t b = 0; b < call.plan->blocks; ++b) {
        const Reach reach = a.reach(b);
        const int32_t* pages = a.pages(reach.first);
        const int64_t last = a.position(reach.last - 1) / call.page;
        for (int64_t i = a.lowest(reach.first) / call.page; i <= last; ++i) body(pages[i]);
      }
    };
    count_ = 0;
    each([&](int64_t) { ++count_; });
    pages_ = scratch<kPages, const char*>(count_);
    each([&, to = pages_](int64_t page) mutable {
      *to++ = static_cast<const char*>(call.cache) + page * page_bytes_;
    });
  }

  void share_pages(int64_t most) {
    shares_ = scratch<kShares, Share>(threads_);
    const int64_t each = most / page_bytes_ / threads_;
    for (int64_t i = 0; i < threads_; ++i) {
      const Rows own = part(count_, threads_, i);
      shares_[i] = {own.first, own.first + std::min(own.count, each), 0, 0};
    }
  }

  const int64_t threads_;
  int64_t page_bytes_ = 0, count_ = 0;
  double lines_per_product_ = 0;
  const char** pages_ = nullptr;
  Share* shares_ = nullptr;
};

}  // namespace blockllm
