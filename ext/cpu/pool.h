// A small persistent thread pool. The tasks of a job are shared out in runs, one for each thread, so
// that a thread reads memory that lies together; who is done takes tasks of others one by one, so a
// thread that the system runs late costs little. Idle workers spin briefly, then sleep on a futex.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace blockllm {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls body(task) once for every task in [0, tasks), the calling thread included; returns when
  // all are done. Which thread runs a task never changes its result.
  template <class Body>
  void run(int64_t tasks, const Body& body) {
    if (tasks <= 1 || threads_ == 1) {
      for (int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    post(
        tasks,
        [](const void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
        &body);
  }

  // Which thread of its pool this is.
  static int thread();

  // The first task of a thread's run; the caller of `run` is thread 0.
  static int64_t first_task(int64_t tasks, int64_t thread, int64_t threads) {
    return tasks * thread / threads;
  }

  // Tells what a thread will read before long: it fetches that while it waits for others.
  void foresee(int thread, const void* at, int64_t bytes);

 private:
  using Function = void (*)(const void*, int64_t);

  // What belongs to one thread.
  struct alignas(64) Lane {
    std::atomic<uint64_t> claim{0};  // job number << 32 | next task of its run
    std::atomic<int64_t> end{0};     // of its run
    alignas(64) std::atomic<const char*> soon{nullptr};  // what it will read
    std::atomic<int64_t> soon_bytes{0};
    const char* fetched = nullptr;  // of which thread itself alone has fetched so much
    int64_t fetched_bytes = 0;
  };

  void post(int64_t tasks, Function function, const void* context);
  void offer(uint32_t job, int64_t tasks);
  void participate(uint32_t job, int thread);
  int64_t work(Lane& lane, uint32_t job);
  void serve(int thread);
  bool idle(uint32_t seen, int thread);
  void linger(int thread);

  const int threads_;
  std::unique_ptr<Lane[]> lanes_;
  std::vector<std::thread> workers_;
  std::mutex posting_;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  alignas(64) std::atomic<uint32_t> signal_{0};  // the job number, where sleepers wait
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace blockllm
