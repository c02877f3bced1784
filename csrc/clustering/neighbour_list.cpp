// See neighbour_list.h.
#include "clustering/neighbour_list.h"

#include <algorithm>

namespace hiexp::clustering {

void NeighbourList::offer(const ListEntry& entry, int32_t id, const std::vector<int32_t>& ids) {
  const auto hash = [&](int32_t slot) { return pair_hash(id, ids[static_cast<size_t>(slot)]); };
  const auto before = [&](const ListEntry& left, const ListEntry& right) {
    return left.cost != right.cost ? left.cost < right.cost : hash(left.slot) < hash(right.slot);
  };
  const bool full = entries.size() == kListLength;
  if (full && !before(entry, entries.back())) {
    bound = std::min(bound, entry.cost);
    return;
  }
  if (full) {
    bound = std::min(bound, entries.back().cost);
    entries.pop_back();
  }
  entries.insert(std::upper_bound(entries.begin(), entries.end(), entry, before), entry);
}

}  // namespace hiexp::clustering
