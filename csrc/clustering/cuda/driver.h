// The run as a whole, the same for the device and for its emulation. A Backend runs steps: `each` one item at a time,
// `teams` with a team of lanes an item, `octets` with eight; `scan_bounds` and `scan_costs` fill lists from candidates.
// The host decides only how many slots are still listed and when the run is over, from counters read every few rounds.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "clustering/cuda/scan_logic.h"
#include "clustering/cuda/tail_logic.h"
#include "clustering/monitor.h"
#include "clustering/points.h"

namespace hiexp::clustering::device {

// Between two looks of the host: so many times a few rounds of merges and, where the last one found no pair, a scan.
constexpr int kStepsPerLook = 4;
constexpr int kRoundsPerStep = 2;
constexpr int kPathPasses = 8;

// Pair products of one launch of the first pass; so much work lasts about a tenth of a second on an H100.
constexpr double kPassWork = 2e13;

template <typename Backend>
class Driver {
 public:
  Driver(Backend& backend, const Clusters& clusters, Method method, Metric metric, double threshold, Monitor& monitor)
      : backend_(backend), c_(clusters), metric_(metric), threshold_(threshold), monitor_(monitor) {
    c_.method = method;
    c_.points = static_cast<double>(c_.n);
  }

  // Merges in an order in which children come before parents, duplicates first.
  template <typename Scalar>
  std::vector<Merge> run(const Scalar* input, int64_t width) {
    load(input, width);
    std::vector<Merge> merges = collapse();
    if (monitor_.stats.n > 1) {
      place_rows();
      first_pass();
      rounds();
    }
    append_merges(merges);
    return merges;
  }

 private:
  Span all(int64_t count) const { return {nullptr, nullptr, count}; }
  Span listed() const { return all(c_.listed); }
  Span list(const int32_t& count) const { return {nullptr, &count, c_.listed}; }
  Span pairs() const { return {&c_.counters->pair_begin, &c_.counters->merges, c_.listed / 2}; }
  Counters look() const {
    Counters now;
    backend_.read(&now, c_.counters, 1);
    return now;
  }

  template <typename Scalar>
  void load(const Scalar* input, int64_t width) {
    Counters start{};
    start.first_bad = start.first_zero_row = kNoKey;
    start.forced = -1;
    backend_.write(c_.counters, &start, 1);
    backend_.zero(c_.sizes, c_.n);
    backend_.each(all(c_.n), LoadRow<Scalar>{c_, input, width, metric_ == Metric::cosine});
    backend_.each(all(static_cast<int64_t>(Table::of(c_).mask) + 1), ClearTable{c_});
    backend_.each(all(c_.n), EnterRow{c_});
    backend_.each(all(c_.n), FindTwin{c_});
    const Counters found = look();
    if (found.first_bad != kNoKey) refuse_value(static_cast<int64_t>(found.first_bad), width);
    if (found.first_zero_row != kNoKey) refuse_zero_row(static_cast<size_t>(found.first_zero_row));
  }

  void refuse_value(int64_t place, int64_t width) const {
    double value = 0.0;
    backend_.read(&value, c_.centroid(place / width) + place % width, 1);
    refuse_non_finite(value, static_cast<size_t>(place / width), static_cast<size_t>(place % width));
  }

  // Fills live_ with the first row of each group of equal rows; the others merge at height 0.
  std::vector<Merge> collapse() {
    std::vector<Merge> merges;
    std::vector<int32_t> first(static_cast<size_t>(c_.n));
    backend_.read(first.data(), c_.work, c_.n);
    for (int32_t i = 0; i < c_.n; ++i) {
      const int32_t twin = first[static_cast<size_t>(i)];
      if (twin == i) {
        live_.push_back(i);
      } else {
        merges.push_back({twin, i, 0.0});
      }
    }
    c_.listed = static_cast<int32_t>(live_.size());
    monitor_.stats.n = live_.size();
    monitor_.stats.duplicates = merges.size();
    return merges;
  }

  void place_rows() {
    const int64_t parts = static_cast<int64_t>(kParts) * c_.d;
    backend_.each(all(parts), ExtremesOfPart{c_});
    backend_.each(all(c_.d), Extremes{c_});
    std::vector<double> low(static_cast<size_t>(c_.d)), high = low;
    backend_.read(low.data(), c_.low, c_.d);
    backend_.read(high.data(), c_.high, c_.d);
    const Placement to = place(low, high);
    exponent_ = to.exponent;
    check_squares(metric_, exponent_);
    backend_.write(c_.low, to.shift.data(), c_.d);
    backend_.each(all(static_cast<int64_t>(c_.n) * c_.d), ShiftAndScale{c_, to.first, to.second});
    backend_.each(all(parts), MeanOfPart{c_});
    backend_.each(all(c_.d), Mean{c_});
    c_.retire = retire_cost(c_.method, metric_, threshold_, exponent_);
    backend_.each(all(c_.n), StartCluster{c_});
    backend_.teams(all(c_.n), EncodeRow{c_});
    backend_.write(c_.columns, live_.data(), c_.listed);
  }

  void first_pass() {
    monitor_.begin("scan", monitor_.stats.n);
    backend_.each(listed(), ScanAll{c_});
    const double rows = kPassWork / (static_cast<double>(c_.listed) * c_.depth);
    const auto chunk = static_cast<int64_t>(std::clamp(rows / kTile, 1.0, 1e6)) * kTile;
    for (int64_t first = 0; first < c_.listed; first += chunk) {
      const int64_t count = std::min<int64_t>(chunk, c_.listed - first);
      backend_.scan_bounds(c_, c_.scan + first, all(count));
      backend_.wait();
      monitor_.advance(static_cast<size_t>(count));
      monitor_.poll();
    }
    finish_scan();
  }

  // Candidates of the rows in `scan` are in their lists.
  void finish_scan() {
    const Counters& now = *c_.counters;
    backend_.octets(list(now.scan), kList, RowCosts{c_, c_.scan});
    backend_.each(list(now.scan), FinishScan{c_});
    backend_.scan_costs(c_, c_.exact, list(now.exact));
    backend_.each(list(now.exact), FinishExact{c_});
    backend_.each(all(1), CountExact{c_});
  }

  void rounds() {
    monitor_.begin("merge", monitor_.stats.n - 1);
    Counters before{}, now = look();
    while (now.alive > 1) {
      if (now.alive > kTailLeast && now.alive <= c_.tail) {
        tail();
      } else {
        compact(now.alive);
        for (int step = 0; step < kStepsPerLook; ++step) {
          for (int round = 0; round < kRoundsPerStep; ++round) merge_round();
          scan_step();
        }
      }
      before = now;
      now = look();
      monitor_.advance(static_cast<size_t>(now.merges - before.merges));
      monitor_.poll();
      if (now.alive == before.alive && now.scanned == before.scanned && now.forced_round == before.forced_round) {
        throw std::logic_error("hiexp.linkage: rounds without progress on the device; please report the input");
      }
    }
    monitor_.stats.rounds = now.round;
    monitor_.stats.pairs = static_cast<double>(now.pairs);
    monitor_.stats.scanned = now.scanned;
    monitor_.stats.rescans = now.scanned - monitor_.stats.n;
    monitor_.stats.certified = now.certified;
    monitor_.stats.exact_rows = now.exact_rows;
  }

  void merge_round() {
    const Counters& now = *c_.counters;
    backend_.each(all(1), BeginRound{c_});
    backend_.each(listed(), Collect{c_});
    backend_.each(list(now.work), Refresh{c_});
    backend_.octets(list(now.work), kList, RowCosts{c_, c_.work});
    backend_.each(list(now.work), Settle{c_});
    backend_.each(listed(), Claim{c_});
    backend_.each(listed(), TakePairs{c_});
    if (c_.method != Method::ward) backend_.octets(pairs(), 1, PairSquares{c_});
    backend_.teams(pairs(), MergeCentroids{c_});
    backend_.each(pairs(), JoinLists{c_});
    backend_.octets(pairs(), 2 * kList, JointCosts{c_});
    backend_.each(pairs(), FinishMerge{c_});
    backend_.each(listed(), MarkLost{c_});
  }

  void scan_step() {
    backend_.each(all(1), BeginScan{c_});
    backend_.each(listed(), Demand{c_});
    backend_.each(listed(), DemandMost{c_});
    backend_.each(all(1), LimitScan{c_});
    backend_.scan_bounds(c_, c_.scan, list(c_.counters->scan));
    finish_scan();
  }

  void tail() {
    list_live();
    backend_.octets(listed(), c_.listed, TailCosts{c_});
    backend_.tail(c_);
  }

  // Halving keeps the total cost below twice the first.
  void compact(int32_t alive) {
    if (2 * static_cast<int64_t>(alive) > c_.listed) return;
    list_live();
    for (int pass = 0; pass < kPathPasses; ++pass) backend_.each(all(c_.n), HalvePaths{c_});
  }

  void list_live() {
    std::vector<State> states(static_cast<size_t>(c_.n));
    backend_.read(states.data(), c_.states, c_.n);
    size_t kept = 0;
    for (const int32_t slot : live_) {
      if (states[static_cast<size_t>(slot)] != State::empty) live_[kept++] = slot;
    }
    live_.resize(kept);
    c_.listed = static_cast<int32_t>(kept);
    backend_.write(c_.columns, live_.data(), c_.listed);
  }

  void append_merges(std::vector<Merge>& merges) const {
    const int32_t count = look().merges;
    std::vector<Record> records(static_cast<size_t>(count));
    backend_.read(records.data(), c_.records, count);
    std::sort(records.begin(), records.end());
    for (const Record& record : records) {
      merges.push_back({record.keep, record.drop, centroid_height(c_.method, metric_, exponent_, record.cost)});
    }
  }

  Backend& backend_;
  Clusters c_;
  Metric metric_;
  double threshold_;
  Monitor& monitor_;
  int exponent_ = 0;
  std::vector<int32_t> live_;  // slots on the device's list of columns
};

}  // namespace hiexp::clustering::device
