// The CUDA kernel's steps on CPU threads, in any order of rows: the inline functions are the kernel's own, only the
// barriers (here: joining the threads) and the atomics are the host's. Compiled and called by
// test_group_advantage_kernel.py.
#include <functional>
#include <thread>
#include <vector>

#include "advantage/phases.h"

namespace {

using namespace hiexp::advantage;

struct AtomicAdd {
  void plus(int64_t* to, int64_t value) const { __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
  void lower(int64_t* to, int64_t value) const {
    int64_t seen = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (value < seen && !__atomic_compare_exchange_n(to, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  void raise(int64_t* to, int64_t value) const {
    int64_t seen = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (value > seen && !__atomic_compare_exchange_n(to, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
};

struct AtomicSwap {
  int32_t operator()(int32_t* entry, int32_t row) const {
    int32_t seen = -1;
    __atomic_compare_exchange_n(entry, &seen, row, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return seen;
  }
};

// One step: thread t takes the rows order[t], order[t + threads], ...
void step(const int64_t* order, int64_t rows, int threads, const std::function<void(int64_t)>& work) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([=, &work] {
      for (int64_t i = t; i < rows; i += threads) work(order[i]);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

extern "C" {

// Returns whether the run path sufficed. With `only_table` it is not tried.
int emulate(const float* rewards, const void* labels, int type, int64_t rows, const int64_t* order, int threads,
            int64_t longest_run, int only_table, int baseline, int scale, int singleton, int ddof, double eps,
            float* advantages, bool* degenerate, float* mean, float* std, int32_t* count) {
  const Batch<float> batch{rewards, {labels, static_cast<LabelType>(type)}, rows, {}};
  const Result<float> result{advantages, degenerate, mean, std, count, nullptr, nullptr};
  const Options options{static_cast<Baseline>(baseline), static_cast<Scale>(scale), static_cast<Singleton>(singleton),
                        ddof, eps};
  int fallback = only_table != 0 || needs_table(options);
  if (!fallback) {
    step(order, rows, threads, [&](int64_t row) {
      if (!starts_run(batch.labels, row)) return;
      const int64_t end = end_of_run(batch.labels, row, rows, longest_run);
      if (descends(batch.labels, row) || end - row > longest_run) {
        __atomic_store_n(&fallback, 1, __ATOMIC_RELAXED);
      } else {
        score_run(batch, row, end, options, result);
      }
    });
    if (!fallback) return 1;
  }
  std::vector<Accumulator> groups(rows + 1, empty_accumulator());
  std::vector<int32_t> table(table_capacity(rows), -1), group_of(rows);
  const Workspace workspace{groups.data(), nullptr, table.data(), group_of.data(), table_capacity(rows)};
  Accumulator* const whole = &groups[rows];
  step(order, rows, threads, [&](int64_t row) { group_of[row] = claim(AtomicSwap{}, batch.labels, row, workspace); });
  const AtomicAdd add;
  step(order, rows, threads, [&](int64_t row) {
    add_extent(add, &groups[group_of[row]], row, rewards[row]);
    add_extent(add, whole, row, rewards[row]);
  });
  step(order, rows, threads, [&](int64_t row) {
    add_position(add, &groups[group_of[row]], rewards[row]);
    add_position(add, whole, rewards[row]);
  });
  step(order, rows, threads, [&](int64_t row) {
    add_square(add, &groups[group_of[row]], rewards[row]);
    add_square(add, whole, rewards[row]);
  });
  const double deviation = moments_of(*whole, ddof).deviation;
  step(order, rows, threads,
       [&](int64_t row) { write_row_from_table(batch, row, workspace, deviation, options, result); });
  return 0;
}
}
