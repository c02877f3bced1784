// See centroid_space.h.
//
// A scan proposes candidates in float32 with a proven bound; their costs are then computed in float64 from differences
// of centroids, which neither cancels nor depends on the order of the operands. Where the bound cannot decide (ties,
// tiny gaps), the whole row is computed in float64. Lists survive merges, so that most neighbours need no second scan.
#include "clustering/centroid_space.h"

#include <algorithm>
#include <cmath>

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
      panels_(points.n, points.d, method == Method::ward, mean_row(points)) {
  centroids_ = std::move(points.rows);
  for (size_t i = 0; i < slots(); ++i) {
    forward_[i] = static_cast<int32_t>(i);
    n_points_ += sizes_[i];
  }
  pool_.run_ranges(slots(), kPanelColumns, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) panels_.set(i, centroid(i), 0.0, sizes_[i]);
  });
}

double CentroidSpace::height(double cost) const {
  return centroid_height(method_, metric_, exponent_, cost);
}

double CentroidSpace::cost(size_t i, size_t j) const {
  const double squares = squared_distance(centroid(i), centroid(j), d_);
  return method_ == Method::ward ? ward_weight(sizes_[i], sizes_[j]) * squares : squares + (spreads_[i] + spreads_[j]);
}

int32_t CentroidSpace::current(int32_t slot) const {
  while (slot >= 0 && forward_[static_cast<size_t>(slot)] != slot) slot = forward_[static_cast<size_t>(slot)];
  return slot;
}

// Brings a list up to date with the merges since: entries follow their cluster, with its new cost; twins go.
void CentroidSpace::refresh(size_t row) {
  auto& entries = lists_[row].entries;
  size_t kept = 0;
  for (ListEntry entry : entries) {
    const int32_t slot = current(entry.slot);
    if (slot < 0 || slot == static_cast<int32_t>(row)) continue;
    const uint32_t version = versions_[static_cast<size_t>(slot)];
    if (slot != entry.slot || version != entry.stamp) {
      const auto same = [slot](const ListEntry& other) { return other.slot == slot; };
      if (std::any_of(entries.begin(), entries.begin() + static_cast<std::ptrdiff_t>(kept), same)) continue;
      entry = {slot, version, cost(row, static_cast<size_t>(slot))};
    }
    entries[kept++] = entry;
  }
  entries.resize(kept);
}

std::vector<Neighbour> CentroidSpace::nearest(const std::vector<int32_t>& rows, bool scan) {
  std::vector<Neighbour> found(rows.size());
  pool_.run_ranges(rows.size(), 16, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const auto row = static_cast<size_t>(rows[r]);
      refresh(row);
      found[r] = lists_[row].certified(ids_[row], ids_);
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
    if (found[r].slot < 0) found[r] = lists_[row].certified(ids_[row], ids_);
  }
  return found;
}

void CentroidSpace::scan_rows(const std::vector<int32_t>& rows) {
  constexpr size_t kKeep = kListLength + 1;
  const bool all = rows.size() == slots();
  count_scan(rows.size(), all);
  const std::vector<Candidate> candidates =
      all ? panels_.scan_all(kKeep, pool_, monitor_) : panels_.scan(rows, kKeep, nullptr, pool_);
  std::vector<uint8_t> certain(rows.size());
  pool_.run_ranges(rows.size(), 16, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const auto row = static_cast<size_t>(rows[r]);
      const Candidate* mine = candidates.data() + r * kKeep;
      NeighbourList& list = lists_[row];
      list.entries.clear();
      list.bound = static_cast<double>(mine[kListLength].bound);
      for (size_t c = 0; c < kListLength && mine[c].slot >= 0; ++c) offer(row, static_cast<size_t>(mine[c].slot));
      certain[r] = list.certified(ids_[row], ids_).slot >= 0;
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

void CentroidSpace::offer(size_t row, size_t slot) {
  lists_[row].offer({static_cast<int32_t>(slot), versions_[slot], cost(row, slot)}, ids_[row], ids_);
}

// All costs of the rows in float64; several rows meet a centroid while it is in the cache.
void CentroidSpace::scan_exactly(const std::vector<int32_t>& rows) {
  monitor_.stats.exact_rows += rows.size();
  monitor_.stats.pairs += static_cast<double>(rows.size()) * static_cast<double>(slots());
  pool_.run_ranges(rows.size(), kExactRows, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      lists_[static_cast<size_t>(rows[r])].entries.clear();
      lists_[static_cast<size_t>(rows[r])].bound = kInfinity;
    }
    for (size_t slot = 0; slot < slots(); ++slot) {
      if (sizes_[slot] == 0.0) continue;
      for (size_t r = begin; r < end; ++r) {
        if (static_cast<size_t>(rows[r]) != slot) offer(static_cast<size_t>(rows[r]), slot);
      }
    }
  });
}

void CentroidSpace::merge(const std::vector<Pair>& pairs) {
  // In two passes: the new lists need the new centroids of all pairs.
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
  lists_[a].bound = merged_bound(method_, sizes_[a], sizes_[b], lists_[a].bound, lists_[b].bound, pair.cost, n_points_);
  double* target = centroids_.data() + a * d_;
  for (size_t k = 0; k < d_; ++k) target[k] += share * (centroid(b)[k] - target[k]);
  if (method_ != Method::ward) {
    spreads_[a] += share * (spreads_[b] - spreads_[a]) + share * (1.0 - share) * squares;
  }
  sizes_[a] = total;
  sizes_[b] = 0.0;
  forward_[b] = pair.keep;
  ++versions_[a];
  panels_.set(a, centroid(a), spreads_[a], total);
  panels_.remove(b);
}

void CentroidSpace::merge_lists(const Pair& pair) {
  const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
  std::vector<ListEntry> known = std::move(lists_[a].entries);
  known.insert(known.end(), lists_[b].entries.begin(), lists_[b].entries.end());
  lists_[a].entries.clear();
  lists_[b] = {};
  std::vector<int32_t> seen;
  for (const ListEntry& entry : known) {
    const int32_t slot = current(entry.slot);
    if (slot < 0 || slot == pair.keep || std::find(seen.begin(), seen.end(), slot) != seen.end()) continue;
    seen.push_back(slot);
    offer(a, static_cast<size_t>(slot));
  }
}

void CentroidSpace::compact(const std::vector<int32_t>& kept) {
  std::vector<int32_t> renumbered(slots(), -1);
  for (size_t i = 0; i < kept.size(); ++i) renumbered[static_cast<size_t>(kept[i])] = static_cast<int32_t>(i);
  pool_.run_ranges(kept.size(), 64, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      for (ListEntry& entry : lists_[static_cast<size_t>(kept[i])].entries) {
        const int32_t slot = current(entry.slot);
        // A cluster that followed a merge keeps its old cost under a stamp that no version has, so that it is renewed.
        if (slot != entry.slot) entry.stamp = ~0u;
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
