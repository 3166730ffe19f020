// Memory that a thread keeps for its intermediate results, one growing buffer per use.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace blockllm {

enum Use {
  // tiles of a projection
  kSums,
  kWidened,
  // rows of a projection
  kRow,
  kRows,
  kPacked,
  kCut,
  kGroupSums,
  kShrunk,
  kShrunkStarts,
  kShrinkTasks,
  // bottlenecks
  kDetourRows,
  kDetourSums,
  kInner,
  // attention
  kQueries,
  kKeys,
  kHead,
  kTurned,
  kKeyTiles,
  kScores,
  kWeights,
  kPartial,
  kSpanResult,
  kState,
  // candidates of top-k
  kChosen,
};

class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `bytes` bytes, aligned to 64, with undefined content.
  void* take(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + bytes / 4 + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, size_);
      if (data_ == nullptr) throw std::bad_alloc();
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
