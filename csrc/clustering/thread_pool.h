// Worker threads that live for one call: parallel loops over task numbers, without a dependency on OpenMP. Between its
// tasks the calling thread polls, so that a run can be watched and stopped: tasks should take less than 0.2 s.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace hiexp::clustering {

class ThreadPool {
 public:
  // `poll` is called on the calling thread between tasks, often, and may throw.
  explicit ThreadPool(int n_threads, std::function<void()> poll = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task) once for every task in [0, n_tasks). Which thread runs a task is not fixed, so results must not
  // depend on it. The first exception of a task or of `poll` skips the tasks not yet begun and is thrown again here.
  void run(size_t n_tasks, const std::function<void(size_t)>& body);

  // The same with the number of the thread, in [0, size()): body(task, lane). For results collected per thread.
  void run_lanes(size_t n_tasks, const std::function<void(size_t, size_t)>& body);

  // The same over [0, n) in ranges of at most `grain` elements: body(begin, end).
  void run_ranges(size_t n, size_t grain, const std::function<void(size_t, size_t)>& body);

 private:
  void work(size_t lane);
  void take_tasks(size_t lane);

  std::function<void()> poll_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(size_t, size_t)>* body_ = nullptr;
  size_t n_tasks_ = 0;
  std::atomic<size_t> next_{0};
  size_t busy_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
};

}  // namespace hiexp::clustering
