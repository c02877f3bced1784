// The order of neighbours, shared by every backend.
#pragma once

#include "clustering/method.h"

namespace hiexp::clustering {

// Whether a neighbour at `cost` comes before another: cheaper first, then by pair_hash of the ids, then by slot.
struct Rank {
  double cost;
  uint64_t hash;
  int32_t slot;
};

HIEXP_HD inline bool operator<(const Rank& left, const Rank& right) {
  if (left.cost != right.cost) return left.cost < right.cost;
  return left.hash != right.hash ? left.hash < right.hash : left.slot < right.slot;
}

}  // namespace hiexp::clustering
