// Memory that a thread keeps for its intermediate results, one growing buffer per use.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace blockllm {

enum Use {
  // tiles of a projection
  kSums,
  kTurnedCodes,
  kUnfolded,
  kLines,
  kGroupList,
  // rows of a projection
  kRow,
  kRows,
  kPacked,
  kCut,
  kThrough,
  kGroupSums,
  kShrunk,
  kShrunkStarts,
  kShrinkTasks,
  kBests,
  // bottlenecks
  kDetourRows,
  kDetourSums,
  kInner,
  // errands
  kPages,
  kShares,
  // attention
  kQueries,
  kKeys,
  kNextKeys,
  kSoon,
  kHead,
  kTurned,
  kKeyTiles,
  kScores,
  kWeights,
  kPartial,
  kSpanResult,
  kState,
};

constexpr size_t kHugePage = size_t{2} << 20;

class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `bytes` bytes, aligned to 64, with undefined content; large ones on huge pages, where
  // fetching ahead does not stop at every 4 KiB.
  void* take(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      const size_t unit = bytes < kHugePage / 16 ? 64 : kHugePage;
      size_ = (bytes + bytes / 4 + unit - 1) / unit * unit;
      data_ = std::aligned_alloc(unit, size_);
      if (data_ == nullptr) throw std::bad_alloc();
      if (unit == kHugePage) madvise(data_, size_, MADV_HUGEPAGE);
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// This thread's buffer for one use, valid until the thread asks again for that use.
template <Use use, class T = float>
T* scratch(int64_t count) {
  static thread_local Buffer buffer;
  return static_cast<T*>(buffer.take(static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace blockllm
