// See thread_pool.h.
#include "clustering/thread_pool.h"

#include <algorithm>

namespace hiexp::clustering {

ThreadPool::ThreadPool(int n_threads, std::function<void()> poll) : poll_(std::move(poll)) {
  for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { work(static_cast<size_t>(i)); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(size_t n_tasks, const std::function<void(size_t)>& body) {
  run_lanes(n_tasks, [&](size_t task, size_t) { body(task); });
}

void ThreadPool::run_lanes(size_t n_tasks, const std::function<void(size_t, size_t)>& body) {
  const bool alone = workers_.empty() || n_tasks <= 1;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = &body;
    n_tasks_ = n_tasks;
    next_ = 0;
    error_ = nullptr;
    if (!alone) {
      busy_ = workers_.size();
      ++generation_;
    }
  }
  if (!alone) start_.notify_all();
  take_tasks(0);
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::run_ranges(size_t n, size_t grain, const std::function<void(size_t, size_t)>& body) {
  run((n + grain - 1) / grain, [&](size_t task) { body(task * grain, std::min(n, (task + 1) * grain)); });
}

void ThreadPool::work(size_t lane) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    start_.wait(lock, [&] { return stop_ || generation_ != seen; });
    if (stop_) return;
    seen = generation_;
    lock.unlock();
    take_tasks(lane);
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

void ThreadPool::take_tasks(size_t lane) {
  for (size_t task = next_++; task < n_tasks_; task = next_++) {
    try {
      (*body_)(task, lane);
      if (lane == 0 && poll_) poll_();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = n_tasks_;
    }
  }
}

}  // namespace hiexp::clustering
