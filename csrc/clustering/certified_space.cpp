// See certified_space.h.
#include "clustering/certified_space.h"

#include <algorithm>

namespace hiexp::clustering {

namespace {

// Larger jobs are split over the threads, smaller ones are spread over them.
constexpr size_t kLargeJob = 1 << 15;

// Decisions may compute this many pairs of points for each point, and this share of all pairs.
constexpr double kPairsPerPoint = 64.0;
constexpr double kShareOfPairs = 0.25;

}  // namespace

CertifiedSpace::CertifiedSpace(Triangle<float> triangle, FloatDistances distances, std::vector<double> sizes,
                               std::vector<int32_t> ids, std::function<double(double)> height, ThreadPool& pool,
                               Monitor& monitor)
    : MatrixSpace<float>(std::move(triangle), Method::complete, std::move(sizes), std::move(ids), std::move(height),
                         pool, monitor),
      distances_(std::move(distances)),
      members_(slots()),
      widths_(slots()) {
  for (size_t i = 0; i < slots(); ++i) {
    members_[i] = {static_cast<int32_t>(i)};
    widths_[i] = distances_.width(i);
  }
  const auto n = static_cast<double>(slots());
  budget_ = n * (kPairsPerPoint + kShareOfPairs * n / 2.0);
}

void CertifiedSpace::settle(std::vector<Pair>& pairs) {
  const auto work = [&](const Pair& pair) {
    return members_[static_cast<size_t>(pair.keep)].size() * members_[static_cast<size_t>(pair.drop)].size();
  };
  const auto compute = [&](Pair& pair, ThreadPool* pool) {
    const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
    pair.cost = distances_.farthest(members_[a], members_[b], pair.cost, pool);
  };
  std::vector<Pair*> small;
  for (Pair& pair : pairs) {
    if (work(pair) > kLargeJob) {
      compute(pair, &pool_);
    } else {
      small.push_back(&pair);
    }
  }
  pool_.run_ranges(small.size(), 4, [&](size_t begin, size_t end) {
    for (size_t p = begin; p < end; ++p) compute(*small[p], nullptr);
  });
}

void CertifiedSpace::spend(const std::vector<Pair>& pairs) {
  monitor_.stats.rechecks += pairs.size();
  for (const Pair& pair : pairs) {
    budget_ -= static_cast<double>(members_[static_cast<size_t>(pair.keep)].size()) *
               static_cast<double>(members_[static_cast<size_t>(pair.drop)].size());
  }
  if (budget_ < 0.0) throw TooClose();
}

// The clusters that may be nearest to a row by its list; `found` is set where one is left, or where unlisted ones may
// be nearer (slot = -1).
CertifiedSpace::Choice CertifiedSpace::choices(size_t row, Neighbour& found) const {
  const NeighbourList& list = this->list(row);
  double limit = kInfinity;
  for (const ListEntry& entry : list.entries) {
    limit = std::min(limit, entry.cost + (widths_[row] + widths_[static_cast<size_t>(entry.slot)]));
  }
  found = {-1, list.bound};
  Choice choice{row, {}};
  if (list.bound <= limit) {
    for (const ListEntry& entry : list.entries) found.cost = std::min(found.cost, entry.cost);
    return choice;
  }
  for (const ListEntry& entry : list.entries) {
    if (entry.cost > limit) continue;
    choice.slots.push_back(entry.slot);
    found = {entry.slot, entry.cost};
  }
  return choice;
}

void CertifiedSpace::decide(const std::vector<int32_t>& rows, std::vector<Neighbour>& found) {
  std::vector<Choice> all(rows.size());
  pool_.run_ranges(rows.size(), 64, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) all[r] = choices(static_cast<size_t>(rows[r]), found[r]);
  });
  std::vector<Choice> open;
  std::vector<Neighbour*> results;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (all[r].slots.size() < 2) continue;
    results.push_back(&found[r]);
    open.push_back(std::move(all[r]));
  }
  choose(open, results);
}

// A list may be too short for all that lie within the error: then the whole row is looked through.
void CertifiedSpace::decide_scanned(int32_t row, Neighbour& found) {
  const auto i = static_cast<size_t>(row);
  Choice choice{i, {}};
  std::vector<double> keys(slots(), kInfinity);
  double limit = kInfinity;
  for (size_t j = 0; j < slots(); ++j) {
    if (j == i || sizes_[j] == 0.0) continue;
    keys[j] = cost(i, j);
    limit = std::min(limit, keys[j] + (widths_[i] + widths_[j]));
  }
  for (size_t j = 0; j < slots(); ++j) {
    if (keys[j] <= limit && keys[j] < kInfinity) choice.slots.push_back(static_cast<int32_t>(j));
  }
  monitor_.stats.exact_rows += 1;
  if (!choice.slots.empty()) choose({choice}, {&found});
}

// The nearest by exact distance; of equal ones the smallest pair_hash, so that no cycle of neighbours can close.
void CertifiedSpace::choose(const std::vector<Choice>& choices, const std::vector<Neighbour*>& found) {
  std::vector<Pair> pairs;
  for (const Choice& choice : choices) {
    for (const int32_t slot : choice.slots) {
      const double key = cost(choice.row, static_cast<size_t>(slot));
      const auto row = static_cast<int32_t>(choice.row);
      pairs.push_back({std::min(row, slot), std::max(row, slot), key});
    }
  }
  if (pairs.empty()) return;
  spend(pairs);
  const std::vector<Pair> keys = pairs;
  settle(pairs);
  size_t p = 0;
  for (size_t c = 0; c < choices.size(); ++c) {
    double best = kInfinity;
    uint64_t best_hash = ~0ULL;
    for (const int32_t slot : choices[c].slots) {
      const uint64_t hash = pair_hash(ids_[choices[c].row], ids_[static_cast<size_t>(slot)]);
      if (pairs[p].cost < best || (pairs[p].cost == best && hash < best_hash)) {
        best = pairs[p].cost;
        best_hash = hash;
        *found[c] = {slot, keys[p].cost};
      }
      ++p;
    }
  }
}

void CertifiedSpace::unite(const std::vector<Pair>& pairs) {
  MatrixSpace<float>::unite(pairs);
  for (const Pair& pair : pairs) {
    const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
    members_[a].insert(members_[a].end(), members_[b].begin(), members_[b].end());
    members_[b] = {};
    widths_[a] = std::max(widths_[a], widths_[b]);
  }
}

void CertifiedSpace::renumber(const std::vector<int32_t>& kept) {
  MatrixSpace<float>::renumber(kept);
  for (size_t i = 0; i < kept.size(); ++i) {
    const auto from = static_cast<size_t>(kept[i]);
    if (from == i) continue;
    members_[i] = std::move(members_[from]);
    widths_[i] = widths_[from];
  }
  members_.resize(kept.size());
  widths_.resize(kept.size());
}

}  // namespace hiexp::clustering
