// See single.h.
//
// Boruvka (1926): every component takes its cheapest outgoing edge, all at once. A point knows its nearest points with
// exact squared distances and a lower bound for all others; a component's edge is certain once it is no longer than the
// bounds of all its points, and only points with smaller bounds are scanned again, past their own component. Components
// that choose each other in a cycle do so at equal lengths: any edge of the cycle may be left out.
#include "clustering/single.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "clustering/exact_scan.h"
#include "clustering/kernels.h"
#include "clustering/neighbour_list.h"
#include "clustering/panels.h"
#include "clustering/union_find.h"

namespace hiexp::clustering {

namespace {

struct Edge {
  double cost = kInfinity;
  int32_t low = -1;
  int32_t high = -1;

  bool operator<(const Edge& other) const {
    return std::tie(cost, low, high) < std::tie(other.cost, other.low, other.high);
  }
};

class SpanningTree {
 public:
  SpanningTree(const Points& points, double limit, ThreadPool& pool, Monitor& monitor)
      : points_(points),
        limit_(limit),
        pool_(pool),
        monitor_(monitor),
        panels_(points.n, points.d, false, mean_row(points, pool)),
        lists_(points.n),
        components_(points.n),
        group_(points.n),
        best_(points.n) {
    pool_.run_ranges(points.n, kPanelColumns, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) panels_.set(i, points.row(i), 0.0, 1.0);
    });
  }

  std::vector<Edge> run() {
    while (edges_.size() + 1 < points_.n) {
      monitor_.poll();
      ++monitor_.stats.rounds;
      for (size_t i = 0; i < points_.n; ++i) group_[i] = static_cast<int32_t>(components_.find(i));
      scan(uncertain_points());
      find_best();
      if (!join()) break;
    }
    std::sort(edges_.begin(), edges_.end());
    return std::move(edges_);
  }

 private:
  // The shortest listed edge out of the component, if it is no longer than all that are not listed.
  Edge cheapest_listed(size_t i) {
    const Neighbour best = lists_[i].cheapest(
        points_.ids[i], points_.ids, kInfinity,
        [&](int32_t slot) { return group_[static_cast<size_t>(slot)] != group_[i]; },
        [&](size_t j) { return squared_distance(points_.row(i), points_.row(j), points_.d); });
    const auto self = static_cast<int32_t>(i);
    return best.slot < 0 ? Edge{} : Edge{best.cost, std::min(self, best.slot), std::max(self, best.slot)};
  }

  void find_best() {
    std::vector<Edge> edges(points_.n);
    pool_.run_ranges(points_.n, 256, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) edges[i] = cheapest_listed(i);
    });
    std::fill(best_.begin(), best_.end(), Edge{});
    for (size_t i = 0; i < points_.n; ++i) {
      Edge& best = best_[static_cast<size_t>(group_[i])];
      best = std::min(best, edges[i]);
    }
  }

  // Points that may have an unlisted edge as short as the best one of their component.
  std::vector<int32_t> uncertain_points() {
    find_best();
    std::vector<int32_t> rows;
    for (size_t i = 0; i < points_.n; ++i) {
      const double best = best_[static_cast<size_t>(group_[i])].cost;
      if (lists_[i].bound < std::min(best, limit_)) rows.push_back(static_cast<int32_t>(i));
    }
    if (2 * rows.size() <= points_.n) return rows;
    // All at once costs half as much a row, as a product serves both its points.
    rows.resize(points_.n);
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
  }

  void scan(const std::vector<int32_t>& rows) {
    if (rows.empty()) return;
    constexpr size_t kKeep = kListLength + 1;
    const bool all = rows.size() == points_.n;
    const std::vector<Candidate> found =
        all ? panels_.scan_all(kKeep, group_.data(), pool_, monitor_) : panels_.scan(rows, kKeep, group_.data(), pool_);
    if (edges_.empty()) monitor_.begin("merge", points_.n - 1);
    count_scan(rows.size(), all);
    std::vector<uint8_t> certain(rows.size());
    pool_.run_ranges(rows.size(), 16, [&](size_t begin, size_t end) {
      for (size_t r = begin; r < end; ++r) certain[r] = take(static_cast<size_t>(rows[r]), found.data() + r * kKeep);
    });
    std::vector<int32_t> rest;
    for (size_t r = 0; r < rows.size(); ++r) {
      if (!certain[r]) rest.push_back(rows[r]);
    }
    monitor_.stats.certified += rows.size() - rest.size();
    scan_exactly(rest);
  }

  void count_scan(size_t rows, bool all) {
    const auto n = static_cast<double>(points_.n);
    monitor_.stats.pairs += static_cast<double>(rows) * (all ? (n - 1.0) / 2.0 : n);
    monitor_.stats.scanned += rows;
    if (!edges_.empty()) monitor_.stats.rescans += rows;
  }

  // False where float32 cannot rank the candidates (ties, tiny gaps): the row must be computed in float64 then.
  bool take(size_t i, const Candidate* candidates) {
    NeighbourList& list = lists_[i];
    list.entries.clear();
    list.bound = static_cast<double>(candidates[kListLength].bound);
    for (size_t c = 0; c < kListLength && candidates[c].slot >= 0; ++c) {
      list.offer({static_cast<double>(candidates[c].bound), candidates[c].slot, 0, 0}, points_.ids[i], points_.ids);
    }
    return cheapest_listed(i).cost <= list.bound;
  }

  void scan_exactly(const std::vector<int32_t>& rows) {
    if (rows.empty()) return;
    monitor_.stats.exact_rows += rows.size();
    monitor_.stats.pairs += static_cast<double>(rows.size()) * static_cast<double>(points_.n);
    scan_rows_exactly(rows, points_.n, points_.d, points_.ids, lists_, pool_, [&](size_t i, size_t j) {
      if (group_[i] == group_[j]) return ListEntry{kInfinity, -1, 0, 1};
      return ListEntry{squared_distance(points_.row(i), points_.row(j), points_.d), static_cast<int32_t>(j), 0, 1};
    });
  }

  // Adds the best edge of every component; false where none is below the limit.
  bool join() {
    const size_t before = edges_.size();
    for (const Edge& edge : best_) {
      if (edge.low < 0 || edge.cost >= limit_) continue;
      const size_t a = components_.find(static_cast<size_t>(edge.low));
      const size_t b = components_.find(static_cast<size_t>(edge.high));
      if (a == b) continue;  // both sides chose it
      components_.attach(std::max(a, b), std::min(a, b));
      edges_.push_back(edge);
    }
    monitor_.advance(edges_.size() - before);
    return edges_.size() > before;
  }

  const Points& points_;
  double limit_;
  ThreadPool& pool_;
  Monitor& monitor_;
  Panels panels_;
  std::vector<NeighbourList> lists_;
  UnionFind components_;
  std::vector<int32_t> group_;  // (n,) component of each point
  std::vector<Edge> best_;      // (n,) best outgoing edge of the component with that root
  std::vector<Edge> edges_;
};

}  // namespace

std::vector<Merge> spanning_tree(const Points& points, Metric metric, double threshold, ThreadPool& pool,
                                 Monitor& monitor) {
  const auto height = [&](double square) {
    if (metric == Metric::euclidean) return std::ldexp(std::sqrt(square), points.exponent);
    return std::ldexp(metric == Metric::cosine ? square / 2.0 : square, 2 * points.exponent);
  };
  double limit = kInfinity;
  if (threshold < kInfinity) {
    const double scaled = std::ldexp(threshold, metric == Metric::euclidean ? -points.exponent : -2 * points.exponent);
    limit = (metric == Metric::euclidean ? scaled * scaled : (metric == Metric::cosine ? 2.0 : 1.0) * scaled) *
            (1.0 + 1e-9);
  }
  std::vector<Merge> merges;
  for (const Edge& edge : SpanningTree(points, limit, pool, monitor).run()) {
    merges.push_back(
        {points.ids[static_cast<size_t>(edge.low)], points.ids[static_cast<size_t>(edge.high)], height(edge.cost)});
  }
  return merges;
}

}  // namespace hiexp::clustering
