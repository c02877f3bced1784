// A short list of the nearest clusters with their costs, exact or bounded from below, and a proven lower bound on the
// cost of everything else.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "clustering/method.h"

namespace hiexp::clustering {

// Longer lists certify more neighbours without a scan and cost more to keep; 16 balances them for text vectors.
constexpr size_t kListLength = 16;

struct ListEntry {
  double cost;  // exact, or a lower bound
  int32_t slot;
  uint32_t stamp : 31;  // version of the cluster in `slot` that `cost` belongs to
  uint32_t exact : 1;
};

struct NeighbourList {
  std::vector<ListEntry> entries;
  double bound = 0.0;  // every cluster that is not listed costs at least this

  // Adds an entry; of more than kListLength the dearest goes, and the bound falls to its cost. Keeps `entries`, filled
  // by this alone, sorted by (cost, pair_hash), so that of equally distant clusters the same ones stay, whatever the
  // order they come in.
  void offer(const ListEntry& entry, int32_t id, const std::vector<int32_t>& ids);

  // The cheapest of the entries with allowed(slot). Their exact costs are computed by cost(slot) as far as they are
  // needed: while a lower bound lies below `limit` and below the cheapest. slot = -1 if there is none up to `limit`.
  // Ties go to the smallest pair_hash of the ids.
  template <typename Allowed, typename Cost>
  Neighbour cheapest(int32_t id, const std::vector<int32_t>& ids, double limit, const Allowed& allowed,
                     const Cost& cost) {
    Neighbour best;
    uint64_t best_hash = 0;
    while (true) {
      ListEntry* next = nullptr;  // the lowest bound
      best = Neighbour{};
      for (ListEntry& entry : entries) {
        if (entry.cost > std::min(best.cost, limit) || !allowed(entry.slot)) continue;
        if (!entry.exact) {
          if (next == nullptr || entry.cost < next->cost) next = &entry;
          continue;
        }
        const uint64_t hash = pair_hash(id, ids[static_cast<size_t>(entry.slot)]);
        if (entry.cost < best.cost || best.slot < 0 || hash < best_hash) {
          best = {entry.slot, entry.cost};
          best_hash = hash;
        }
      }
      if (next == nullptr || next->cost > best.cost) return best;
      next->cost = cost(static_cast<size_t>(next->slot));
      next->exact = 1;
    }
  }
};

}  // namespace hiexp::clustering
