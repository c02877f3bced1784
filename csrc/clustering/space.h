// What the rounds of reciprocal nearest neighbours need from a set of clusters. Clusters live in slots; a slot keeps
// its number until `compact`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clustering/method.h"

namespace hiexp::clustering {

class Space {
 public:
  virtual ~Space() = default;

  // Number of slots, empty ones included.
  virtual size_t slots() const = 0;

  // Nearest cluster of every row, exact. Without `scan` only what is known already is used; where that is not enough,
  // slot = -1 and the cost is a lower bound. A row without any other cluster gets slot = -1, cost = infinity.
  virtual std::vector<Neighbour> nearest(const std::vector<int32_t>& rows, bool scan) = 0;

  // Whether costs of `nearest` are the distances themselves, so that equal costs are ties. If not, they are lower
  // bounds, and of tied clusters `nearest` chooses by pair_hash.
  virtual bool exact_costs() const { return true; }

  // Replaces the costs of the pairs by those of the distances themselves.
  virtual void settle(std::vector<Pair>&) {}

  // Merges disjoint pairs, each of two clusters that are nearest to each other; `keep` < `drop`.
  virtual void merge(const std::vector<Pair>& pairs) = 0;

  // Renumbers: slot kept[i] becomes slot i, all others vanish; `kept` ascends.
  virtual void compact(const std::vector<int32_t>& kept) = 0;

  // Height of a merge at `cost` in the dendrogram.
  virtual double height(double cost) const = 0;
};

}  // namespace hiexp::clustering
