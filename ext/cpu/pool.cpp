// See pool.h. A task is claimed by raising the low half of a lane's `claim` while its high half
// still names the job: a worker that wakes late sees another job number and touches nothing of the
// old job.
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
constexpr int64_t kLine = 64, kFetchLines = 8;  // fetched at a time: fewer than a core has pending

thread_local int this_thread = 0;

void pause_briefly() {
  for (int i = 0; i < 8; ++i) _mm_pause();
}

void futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, nullptr, nullptr, 0);
}

}  // namespace

int Pool::thread() { return this_thread; }

Pool::Pool(int threads) : threads_(threads), lanes_(new Lane[threads]) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
  stopping_.store(true);
  signal_.fetch_add(1);
  futex(&signal_, FUTEX_WAKE_PRIVATE, INT32_MAX);
  for (auto& worker : workers_) worker.join();
}

void Pool::foresee(int thread, const void* at, int64_t bytes) {
  lanes_[thread].soon.store(static_cast<const char*>(at), std::memory_order_relaxed);
  lanes_[thread].soon_bytes.store(bytes, std::memory_order_relaxed);
}

void Pool::post(int64_t tasks, Function function, const void* context) {
  std::lock_guard<std::mutex> lock(posting_);
  const uint32_t job = signal_.load(std::memory_order_relaxed) + 1;
  // A worker that still holds a claim word of the last job must not take a task with it once the
  // fields below are of this one: the words change first, to such as offer nothing.
  for (int i = 0; i < threads(); ++i)
    lanes_[i].claim.store(static_cast<uint64_t>(job) << 32 | kNothing);
  function_.store(function, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  done_.store(0, std::memory_order_release);
  offer(job, tasks);
  signal_.store(job);
  if (sleepers_.load() > 0) futex(&signal_, FUTEX_WAKE_PRIVATE, INT32_MAX);
  participate(job, 0);
  const auto since = Clock::now();
  while (done_.load(std::memory_order_acquire) < tasks) {
    linger(0);
    if (Clock::now() - since > kPoliteness) sched_yield();
  }
}

void Pool::offer(uint32_t job, int64_t tasks) {
  for (int i = 0; i < threads(); ++i) {
    const int64_t first = first_task(tasks, i, threads());
    lanes_[i].end.store(first_task(tasks, i + 1, threads()), std::memory_order_release);
    lanes_[i].claim.store(static_cast<uint64_t>(job) << 32 | static_cast<uint64_t>(first));
  }
}

void Pool::participate(uint32_t job, int thread) {
  int64_t done = 0;
  for (int i = 0; i < threads(); ++i) done += work(lanes_[(thread + i) % threads()], job);
  if (done > 0) done_.fetch_add(done, std::memory_order_release);
}

// Runs what is left of a lane's tasks; how many that were.
int64_t Pool::work(Lane& lane, uint32_t job) {
  uint64_t word = lane.claim.load(std::memory_order_acquire);
  if (static_cast<uint32_t>(word >> 32) != job) return 0;
  const Function function = function_.load(std::memory_order_acquire);
  const void* const context = context_.load(std::memory_order_acquire);
  const int64_t end = lane.end.load(std::memory_order_acquire);
  int64_t done = 0;
  while (static_cast<uint32_t>(word >> 32) == job) {
    const int64_t task = static_cast<int64_t>(word & kNothing);
    if (task >= end) break;
    if (!lane.claim.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
    function(context, task);
    ++done;
    word = lane.claim.load(std::memory_order_acquire);
  }
  return done;
}

void Pool::serve(int thread) {
  this_thread = thread;
  uint32_t seen = 0;
  while (idle(seen, thread)) {
    seen = signal_.load();
    participate(seen, thread);
  }
}

// Waits for a job other than `seen`; false when the pool ends.
bool Pool::idle(uint32_t seen, int thread) {
  const auto since = Clock::now();
  while (signal_.load(std::memory_order_acquire) == seen) {
    linger(thread);
    const auto waited = Clock::now() - since;
    if (waited > kPoliteness) sched_yield();
    if (waited < kSpin) continue;
    sleepers_.fetch_add(1);
    futex(&signal_, FUTEX_WAIT_PRIVATE, seen);
    sleepers_.fetch_sub(1);
  }
  return !stopping_.load();
}

// Passes a moment: fetches some of what the thread will read, or pauses.
void Pool::linger(int thread) {
  Lane& lane = lanes_[thread];
  const char* soon = lane.soon.load(std::memory_order_relaxed);
  if (soon != lane.fetched) {
    lane.fetched = soon;
    lane.fetched_bytes = 0;
  }
  if (lane.fetched_bytes >= lane.soon_bytes.load(std::memory_order_relaxed)) {
    pause_briefly();
    return;
  }
  for (int64_t i = 0; i < kFetchLines; ++i, lane.fetched_bytes += kLine)
    _mm_prefetch(soon + lane.fetched_bytes, _MM_HINT_T1);
}

}  // namespace blockllm
