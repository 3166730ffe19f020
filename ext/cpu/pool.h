// A small persistent thread pool: tasks of a job are claimed one by one, so a worker that the
// system runs late costs nothing but its share. Idle workers spin briefly, then sleep on a futex.
#pragma once
#include <atomic>
#include <cstdint>
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

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task) once for every task in [0, tasks), the calling thread included; returns when
  // all are done. Which thread runs a task never changes its result.
  template <class Body>
  void run(int64_t tasks, const Body& body) {
    if (tasks <= 1 || workers_.empty()) {
      for (int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    post(
        tasks,
        [](const void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
        &body);
  }

 private:
  using Function = void (*)(const void*, int64_t);

  void post(int64_t tasks, Function function, const void* context);
  void participate(uint32_t job);
  void serve();
  bool idle(uint32_t seen);

  std::vector<std::thread> workers_;
  std::mutex posting_;
  alignas(64) std::atomic<uint64_t> claim_{0};  // job number << 32 | next task of that job
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> tasks_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};  // the job number, where sleepers wait
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace blockllm
