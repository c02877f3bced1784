// What a run tells its caller: progress while it lasts, counts at the end.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

namespace hiexp::clustering {

struct Stats {
  const char* algorithm = "rounds";  // "rounds", "matrix" or "boruvka"
  const char* matrix_dtype = "";     // "float32" or "float64" where distances are kept in a matrix
  uint64_t rechecks = 0;             // distances of clusters computed again in float64 because float32 could not decide
  uint64_t n = 0;                    // distinct rows
  uint64_t rounds = 0;
  double pairs = 0.0;       // distances computed for all pairs and in scans of rows
  uint64_t rescans = 0;     // rows scanned after the first pass
  uint64_t scanned = 0;     // rows whose candidates came from low precision, the first pass included
  uint64_t certified = 0;   // of these, rows whose nearest neighbour the bound decided
  uint64_t exact_rows = 0;  // rows computed whole in float64
  uint64_t duplicates = 0;  // rows that equal an earlier one
  uint64_t merges = 0;      // rows of the dendrogram
  int n_threads = 1;
  double seconds = 0.0;

  // All distances computed, in units of one pass over all pairs of distinct rows.
  double passes() const { return n > 1 ? pairs / (static_cast<double>(n) * static_cast<double>(n - 1) / 2.0) : 0.0; }
  double certified_share() const {
    return scanned > 0 ? static_cast<double>(certified) / static_cast<double>(scanned) : 1.0;
  }
};

class Monitor {
 public:
  // Called on the calling thread; may throw, which stops the run.
  using Report = std::function<void(const char* stage, size_t done, size_t total)>;

  explicit Monitor(Report report) : report_(std::move(report)), start_(Clock::now()), last_(start_) {}

  // A stage of `total` steps begins: "scan" (rows of the first pass) or "merge" (merges made).
  void begin(const char* stage, size_t total) {
    stage_ = stage;
    total_ = total;
    done_ = 0;
  }

  // From any thread.
  void advance(size_t steps) { done_ += steps; }

  // On the calling thread, as often as you like: reports every tenth of a second.
  void poll() {
    const Clock::time_point now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    report();
  }

  // The last report: the merges made, of `total` there may be.
  void finish(size_t total) {
    stats.seconds = std::chrono::duration<double>(Clock::now() - start_).count();
    begin("merge", total);
    done_ = stats.merges;
    report();
  }

  Stats stats;

 private:
  using Clock = std::chrono::steady_clock;

  void report() const {
    if (report_) report_(stage_, done_, total_);
  }

  Report report_;
  Clock::time_point start_, last_;
  const char* stage_ = "scan";
  size_t total_ = 0;
  std::atomic<size_t> done_{0};
};

}  // namespace hiexp::clustering
