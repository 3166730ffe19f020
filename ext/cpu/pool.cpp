// See pool.h. A task is claimed by raising the low half of `claim_` while its high half still names
// the job: a worker that wakes late sees another job number and touches nothing of the old job.
#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

namespace blockllm {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the gap between two operations of a step, short enough to leave the core to
// other processes between steps. After `kPoliteness` a spinning thread offers its core at each
// turn.
constexpr auto kPoliteness = std::chrono::microseconds(30);
constexpr auto kSpin = std::chrono::microseconds(150);
// The task number of a job that offers none yet.
constexpr uint64_t kNothing = 0xffffffffu;

void pause_briefly() {
  for (int i = 0; i < 8; ++i) _mm_pause();
}

void futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, nullptr, nullptr, 0);
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
}

Pool::~Pool() {
  stopping_.store(true);
  signal_.fetch_add(1);
  futex(&signal_, FUTEX_WAKE_PRIVATE, INT32_MAX);
  for (auto& worker : workers_) worker.join();
}

void Pool::post(int64_t tasks, Function function, const void* context) {
  std::lock_guard<std::mutex> lock(posting_);
  const uint32_t job = signal_.load(std::memory_order_relaxed) + 1;
  // A worker that still holds a claim word of the last job must not take a task with it once the
  // fields below are of this one: the word changes first, to one that offers nothing.
  claim_.store(static_cast<uint64_t>(job) << 32 | kNothing);
  function_.store(function, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  tasks_.store(tasks, std::memory_order_release);
  done_.store(0, std::memory_order_release);
  claim_.store(static_cast<uint64_t>(job) << 32);
  signal_.store(job);
  if (sleepers_.load() > 0) futex(&signal_, FUTEX_WAKE_PRIVATE, INT32_MAX);
  participate(job);
  const auto since = Clock::now();
  while (done_.load(std::memory_order_acquire) < tasks) {
    pause_briefly();
    if (Clock::now() - since > kPoliteness) sched_yield();
  }
}

void Pool::participate(uint32_t job) {
  uint64_t word = claim_.load(std::memory_order_acquire);
  if (static_cast<uint32_t>(word >> 32) != job) return;
  const Function function = function_.load(std::memory_order_acquire);
  const void* const context = context_.load(std::memory_order_acquire);
  const int64_t tasks = tasks_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(word >> 32) == job) {
    const int64_t task = static_cast<int64_t>(word & 0xffffffffu);
    if (task >= tasks) return;
    if (!claim_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
    function(context, task);
    done_.fetch_add(1, std::memory_order_release);
    word = claim_.load(std::memory_order_acquire);
  }
}

void Pool::serve() {
  uint32_t seen = 0;
  while (idle(seen)) {
    seen = signal_.load();
    participate(seen);
  }
}

// Waits for a job other than `seen`; false when the pool ends.
bool Pool::idle(uint32_t seen) {
  const auto since = Clock::now();
  while (signal_.load(std::memory_order_acquire) == seen) {
    pause_briefly();
    const auto waited = Clock::now() - since;
    if (waited > kPoliteness) sched_yield();
    if (waited < kSpin) continue;
    sleepers_.fetch_add(1);
    futex(&signal_, FUTEX_WAIT_PRIVATE, seen);
    sleepers_.fetch_sub(1);
  }
  return !stopping_.load();
}

}  // namespace blockllm
