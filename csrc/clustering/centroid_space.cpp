// See centroid_space.h.
//
// A scan proposes candidates in float32 with a proven bound. Costs that decide are computed in float64 from differences
// of centroids, which neither cancels nor depends on the order of the operands; all others stay bounds, also through
// merges. Where the bound cannot decide (ties, tiny gaps), the whole row is computed in float64. Lists survive merges,
// so that most neighbours need no second scan.
#include "clustering/centroid_space.h"

#include <algorithm>
#include <cmath>

#include "clustering/exact_scan.h"
#include "clustering/kernels.h"

namespace hiexp::clustering {

CentroidSpace::CentroidSpace(Points points, Method method, Metric metric, ThreadPool& pool, Monitor& monitor)
    : method_(method),
      metric_(metric),
      pool_(pool),
      monitor_(monitor),
      d_(points.d),
      exponent_(points.exponent),
      sizes_(std::move(points.sizes)),
      spreads_(points.n, 0.0),
      ids_(std::move(points.ids)),
      forward_(points.n),
      versions_(points.n, 0),
      lists_(points.n),
      panels_(points.n, points.d, method == Method::ward, mean_row(points, pool)) {
  centroids_ = std::move(points.rows);
  for (size_t i = 0; i < slots(); ++i) {
    forward_[i] = static_cast<int32_t>(i);
    n_points_ += sizes_[i];
  }
  pool_.run_ranges(slots(), kPanelColumns, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) panels_.set(i, centroid(i), 0.0, sizes_[i]);
  });
}

double CentroidSpace::height(double cost) const { return centroid_height(method_, metric_, exponent_, cost); }

double CentroidSpace::cost(size_t i, size_t j) const {
  const double squares = squared_distance(centroid(i), centroid(j), d_);
  return method_ == Method::ward ? ward_weight(sizes_[i], sizes_[j]) * squares : squares + (spreads_[i] + spreads_[j]);
}

int32_t CentroidSpace::current(int32_t slot) const {
  while (slot >= 0 && forward_[static_cast<size_t>(slot)] != slot) slot = forward_[static_cast<size_t>(slot)];
  return slot;
}

// An entry whose cluster is in `slot` now. If it merged since, reducibility bounds its cost by those of its parts, and
// parts that are not listed cost at least `bound`.
ListEntry CentroidSpace::moved(ListEntry entry, int32_t slot, double bound) const {
  const uint32_t version = versions_[static_cast<size_t>(slot)];
  if (slot == entry.slot && version == entry.stamp) return entry;
  entry.slot = slot;
  entry.stamp = version;
  entry.exact = 0;
  entry.cost = std::min(entry.cost, bound) * kBoundSlack;
  return entry;
}

// Brings a list up to date with the merges since: entries follow their cluster, twins become one.
void CentroidSpace::refresh(size_t row) {
  auto& entries = lists_[row].entries;
  size_t kept = 0;
  for (const ListEntry& old : entries) {
    const int32_t slot = current(old.slot);
    if (slot < 0 || slot == static_cast<int32_t>(row)) continue;
    const ListEntry entry = moved(old, slot, lists_[row].bound);
    const auto end = entries.begin() + static_cast<std::ptrdiff_t>(kept);
    const auto twin = std::find_if(entries.begin(), end, [slot](const ListEntry& other) { return other.slot == slot; });
    if (twin == end) {
      entries[kept++] = entry;
    } else if (!twin->exact) {
      twin->cost = std::min(twin->cost, entry.cost);
    }
  }
  entries.resize(kept);
}

// The cheapest listed cluster if nothing unlisted can be cheaper, else slot = -1 and the bound.
Neighbour CentroidSpace::certified(size_t row) {
  NeighbourList& list = lists_[row];
  const double limit = list.bound * kTie;
  const Neighbour best =
      list.cheapest(ids_[row], ids_, limit, [](int32_t) { return true; }, [&](size_t slot) { return cost(row, slot); });
  return best.slot >= 0 && best.cost <= limit ? best : Neighbour{-1, list.bound};
}

std::vector<Neighbour> CentroidSpace::nearest(const std::vector<int32_t>& rows, bool scan) {
  std::vector<Neighbour> found(rows.size());
  pool_.run_ranges(rows.size(), 16, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const auto row = static_cast<size_t>(rows[r]);
      refresh(row);
      found[r] = certified(row);
    }
  });
  if (!scan) return found;
  std::vector<int32_t> open;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (found[r].slot < 0) open.push_back(rows[r]);
  }
  scan_rows(open);
  for (size_t r = 0; r < rows.size(); ++r) {
    const auto row = static_cast<size_t>(rows[r]);
    if (found[r].slot < 0) found[r] = certified(row);
  }
  return found;
}

void CentroidSpace::scan_rows(const std::vector<int32_t>& rows) {
  constexpr size_t kKeep = kListLength + 1;
  const bool all = rows.size() == slots();
  const std::vector<Candidate> candidates =
      all ? panels_.scan_all(kKeep, nullptr, pool_, monitor_) : panels_.scan(rows, kKeep, nullptr, pool_);
  if (!scanned_before_) monitor_.begin("merge", slots() - 1);
  count_scan(rows.size(), all);
  std::vector<uint8_t> certain(rows.size());
  pool_.run_ranges(rows.size(), 16, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const auto row = static_cast<size_t>(rows[r]);
      const Candidate* mine = candidates.data() + r * kKeep;
      NeighbourList& list = lists_[row];
      list.entries.clear();
      list.bound = static_cast<double>(mine[kListLength].bound);
      for (size_t c = 0; c < kListLength && mine[c].slot >= 0; ++c) {
        offer_bound(row, static_cast<size_t>(mine[c].slot), static_cast<double>(mine[c].bound));
      }
      certain[r] = certified(row).slot >= 0;
    }
  });
  std::vector<int32_t> rest;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!certain[r]) rest.push_back(rows[r]);
  }
  monitor_.stats.certified += rows.size() - rest.size();
  scan_exactly(rest);
}

void CentroidSpace::count_scan(size_t rows, bool all) {
  const auto filled = static_cast<double>(slots());
  monitor_.stats.pairs += static_cast<double>(rows) * (all ? (filled - 1.0) / 2.0 : filled);
  monitor_.stats.scanned += rows;
  if (scanned_before_) monitor_.stats.rescans += rows;
  scanned_before_ = true;
}

void CentroidSpace::offer_bound(size_t row, size_t slot, double bound) {
  lists_[row].offer({bound, static_cast<int32_t>(slot), versions_[slot], 0}, ids_[row], ids_);
}

void CentroidSpace::scan_exactly(const std::vector<int32_t>& rows) {
  if (rows.empty()) return;
  monitor_.stats.exact_rows += rows.size();
  monitor_.stats.pairs += static_cast<double>(rows.size()) * static_cast<double>(slots());
  scan_rows_exactly(rows, slots(), d_, ids_, lists_, pool_, [&](size_t row, size_t slot) {
    if (sizes_[slot] == 0.0 || slot == row) return ListEntry{kInfinity, -1, 0, 1};
    return ListEntry{cost(row, slot), static_cast<int32_t>(slot), versions_[slot], 1};
  });
}

void CentroidSpace::merge(const std::vector<Pair>& pairs) {
  panels_.sizes_differ();
  // In two passes: the new lists need the new versions of all pairs.
  pool_.run_ranges(pairs.size(), 4, [&](size_t begin, size_t end) {
    for (size_t p = begin; p < end; ++p) merge_centroids(pairs[p]);
  });
  pool_.run_ranges(pairs.size(), 4, [&](size_t begin, size_t end) {
    for (size_t p = begin; p < end; ++p) merge_lists(pairs[p]);
  });
}

void CentroidSpace::merge_centroids(const Pair& pair) {
  const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
  const double total = sizes_[a] + sizes_[b], share = mean_share(method_, sizes_[a], sizes_[b]);
  const double squares = squared_distance(centroid(a), centroid(b), d_);
  double* target = centroids_.data() + a * d_;
  for (size_t k = 0; k < d_; ++k) target[k] += share * (centroid(b)[k] - target[k]);
  if (method_ != Method::ward) {
    spreads_[a] += share * (spreads_[b] - spreads_[a]) + share * (1.0 - share) * squares;
  }
  sizes_[a] = total;
  forward_[b] = pair.keep;
  ++versions_[a];
  panels_.set(a, centroid(a), spreads_[a], total);
  panels_.remove(b);
}

// Bounds alone, by the update formula from both sides: exact costs wait until they are asked for.
void CentroidSpace::merge_lists(const Pair& pair) {
  const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
  const double size_b = sizes_[b], size_a = sizes_[a] - size_b;
  sizes_[b] = 0.0;
  refresh(a);
  refresh(b);
  const NeighbourList of_a = std::move(lists_[a]), of_b = std::move(lists_[b]);
  const auto bound = [&](double to_a, double to_b, double n_low, double n_high) {
    return merged_bound(method_, size_a, size_b, to_a, to_b, pair.cost, n_low, n_high);
  };
  lists_[a] = {{}, bound(of_a.bound, of_b.bound, 1.0, n_points_)};
  lists_[b] = {};
  const auto find = [](const NeighbourList& list, int32_t slot) {
    const auto same = [slot](const ListEntry& entry) { return entry.slot == slot; };
    return std::find_if(list.entries.begin(), list.entries.end(), same);
  };
  const auto add = [&](int32_t slot, double to_a, double to_b) {
    const auto third = static_cast<size_t>(slot);
    offer_bound(a, third, bound(to_a, to_b, sizes_[third], sizes_[third]));
  };
  for (const ListEntry& entry : of_a.entries) {
    const auto other = find(of_b, entry.slot);
    add(entry.slot, entry.cost, other == of_b.entries.end() ? of_b.bound : other->cost);
  }
  for (const ListEntry& entry : of_b.entries) {
    if (entry.slot != pair.keep && find(of_a, entry.slot) == of_a.entries.end()) {
      add(entry.slot, of_a.bound, entry.cost);
    }
  }
}

void CentroidSpace::compact(const std::vector<int32_t>& kept) {
  std::vector<int32_t> renumbered(slots(), -1);
  for (size_t i = 0; i < kept.size(); ++i) renumbered[static_cast<size_t>(kept[i])] = static_cast<int32_t>(i);
  pool_.run_ranges(kept.size(), 64, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      for (ListEntry& entry : lists_[static_cast<size_t>(kept[i])].entries) {
        const int32_t slot = current(entry.slot);
        if (slot >= 0) entry = moved(entry, slot, lists_[static_cast<size_t>(kept[i])].bound);
        entry.slot = slot < 0 ? -1 : renumbered[static_cast<size_t>(slot)];
      }
    }
  });
  for (size_t i = 0; i < kept.size(); ++i) {
    const auto from = static_cast<size_t>(kept[i]);
    if (from == i) continue;
    std::copy_n(centroid(from), d_, centroids_.data() + i * d_);
    sizes_[i] = sizes_[from];
    spreads_[i] = spreads_[from];
    ids_[i] = ids_[from];
    versions_[i] = versions_[from];
    lists_[i] = std::move(lists_[from]);
  }
  const size_t m = kept.size();
  centroids_.resize(m * d_);
  sizes_.resize(m);
  spreads_.resize(m);
  ids_.resize(m);
  versions_.resize(m);
  lists_.resize(m);
  forward_.resize(m);
  for (size_t i = 0; i < m; ++i) forward_[i] = static_cast<int32_t>(i);
  panels_.resize(m);
  pool_.run_ranges(m, kPanelColumns, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) panels_.set(i, centroid(i), spreads_[i], sizes_[i]);
  });
}

}  // namespace hiexp::clustering
