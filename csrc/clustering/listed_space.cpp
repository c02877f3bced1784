// See listed_space.h.
#include "clustering/listed_space.h"

#include <algorithm>
#include <numeric>

namespace hiexp::clustering {

namespace {

constexpr uint32_t kNoVersion = (1u << 31) - 1;

}  // namespace

ListedSpace::ListedSpace(Method method, std::vector<double> sizes, std::vector<int32_t> ids, ThreadPool& pool,
                         Monitor& monitor)
    : method_(method),
      pool_(pool),
      monitor_(monitor),
      sizes_(std::move(sizes)),
      ids_(std::move(ids)),
      n_points_(std::accumulate(sizes_.begin(), sizes_.end(), 0.0)),
      forward_(sizes_.size()),
      versions_(sizes_.size(), 0),
      lists_(sizes_.size()) {
  std::iota(forward_.begin(), forward_.end(), 0);
}

int32_t ListedSpace::current(int32_t slot) const {
  while (slot >= 0 && forward_[static_cast<size_t>(slot)] != slot) slot = forward_[static_cast<size_t>(slot)];
  return slot;
}

// Brings a list up to date with the merges since: entries follow their cluster, with its new cost; twins go.
void ListedSpace::refresh(size_t row) {
  auto& entries = lists_[row].entries;
  size_t kept = 0;
  for (ListEntry entry : entries) {
    const int32_t slot = current(entry.slot);
    if (slot < 0 || slot == static_cast<int32_t>(row)) continue;
    const uint32_t version = versions_[static_cast<size_t>(slot)];
    if (slot != entry.slot || version != entry.stamp) {
      const auto same = [slot](const ListEntry& other) { return other.slot == slot; };
      if (std::any_of(entries.begin(), entries.begin() + static_cast<std::ptrdiff_t>(kept), same)) continue;
      entry = {cost(row, static_cast<size_t>(slot)), slot, version, 1};
    }
    entries[kept++] = entry;
  }
  entries.resize(kept);
}

std::vector<Neighbour> ListedSpace::nearest(const std::vector<int32_t>& rows, bool scan) {
  std::vector<Neighbour> found(rows.size());
  pool_.run_ranges(rows.size(), 16, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) refresh(static_cast<size_t>(rows[r]));
  });
  decide(rows, found);
  if (!scan) return found;
  std::vector<int32_t> open;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (found[r].slot < 0) open.push_back(rows[r]);
  }
  scan_rows(open);
  std::vector<Neighbour> scanned(open.size());
  decide(open, scanned);
  for (size_t r = 0, next = 0; r < rows.size(); ++r) {
    if (found[r].slot >= 0) continue;
    found[r] = scanned[next++];
    if (found[r].slot < 0) decide_scanned(rows[r], found[r]);
  }
  return found;
}

void ListedSpace::decide(const std::vector<int32_t>& rows, std::vector<Neighbour>& found) {
  pool_.run_ranges(rows.size(), 64, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) found[r] = certified(static_cast<size_t>(rows[r]));
  });
}

// The cheapest listed cluster if nothing unlisted can be cheaper, else slot = -1 and the bound. Ties go to the smallest
// pair_hash.
Neighbour ListedSpace::certified(size_t row) const {
  Neighbour best;
  uint64_t best_hash = 0;
  for (const ListEntry& entry : lists_[row].entries) {
    if (entry.cost > best.cost) continue;
    const uint64_t hash = pair_hash(ids_[row], ids_[static_cast<size_t>(entry.slot)]);
    if (entry.cost < best.cost || best.slot < 0 || hash < best_hash) {
      best = {entry.slot, entry.cost};
      best_hash = hash;
    }
  }
  return best.cost <= lists_[row].bound * kTie ? best : Neighbour{-1, lists_[row].bound};
}

void ListedSpace::restart(size_t row, double bound) {
  lists_[row].entries.clear();
  lists_[row].bound = bound;
}

void ListedSpace::offer(size_t row, size_t slot) {
  lists_[row].offer({cost(row, slot), static_cast<int32_t>(slot), versions_[slot], 1}, ids_[row], ids_);
}

double ListedSpace::list_limit(size_t row) const {
  const auto& entries = lists_[row].entries;
  return entries.size() < kListLength ? kInfinity : entries.back().cost;
}

void ListedSpace::close(size_t row) { lists_[row].bound = std::min(lists_[row].bound, list_limit(row)); }

void ListedSpace::merge(const std::vector<Pair>& pairs) {
  for (const Pair& pair : pairs) {
    const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
    lists_[a].bound =
        merged_bound(method_, sizes_[a], sizes_[b], lists_[a].bound, lists_[b].bound, pair.cost, 1.0, n_points_);
  }
  unite(pairs);
  for (const Pair& pair : pairs) {
    const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
    sizes_[a] += sizes_[b];
    sizes_[b] = 0.0;
    forward_[b] = pair.keep;
    ++versions_[a];
  }
  pool_.run_ranges(pairs.size(), 4, [&](size_t begin, size_t end) {
    for (size_t p = begin; p < end; ++p) merge_lists(pairs[p]);
  });
}

void ListedSpace::merge_lists(const Pair& pair) {
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

void ListedSpace::compact(const std::vector<int32_t>& kept) {
  std::vector<int32_t> renumbered(slots(), -1);
  for (size_t i = 0; i < kept.size(); ++i) renumbered[static_cast<size_t>(kept[i])] = static_cast<int32_t>(i);
  pool_.run_ranges(kept.size(), 64, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      for (ListEntry& entry : lists_[static_cast<size_t>(kept[i])].entries) {
        const int32_t slot = current(entry.slot);
        // A cluster that followed a merge keeps its old cost under a stamp that no version has, so that it is renewed.
        if (slot != entry.slot) entry.stamp = kNoVersion;
        entry.slot = slot < 0 ? -1 : renumbered[static_cast<size_t>(slot)];
      }
    }
  });
  renumber(kept);
  for (size_t i = 0; i < kept.size(); ++i) {
    const auto from = static_cast<size_t>(kept[i]);
    if (from == i) continue;
    sizes_[i] = sizes_[from];
    ids_[i] = ids_[from];
    versions_[i] = versions_[from];
    lists_[i] = std::move(lists_[from]);
  }
  const size_t m = kept.size();
  sizes_.resize(m);
  ids_.resize(m);
  versions_.resize(m);
  lists_.resize(m);
  forward_.resize(m);
  std::iota(forward_.begin(), forward_.end(), 0);
}

}  // namespace hiexp::clustering
