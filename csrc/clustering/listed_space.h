// A Space that remembers the nearest clusters of every cluster in certified lists, so that most neighbours lost to a
// merge are found again without a scan.
#pragma once

#include <vector>

#include "clustering/monitor.h"
#include "clustering/neighbour_list.h"
#include "clustering/space.h"
#include "clustering/thread_pool.h"

namespace hiexp::clustering {

class ListedSpace : public Space {
 public:
  size_t slots() const override { return sizes_.size(); }
  std::vector<Neighbour> nearest(const std::vector<int32_t>& rows, bool scan) override;
  void merge(const std::vector<Pair>& pairs) override;
  void compact(const std::vector<int32_t>& kept) override;

 protected:
  ListedSpace(Method method, std::vector<double> sizes, std::vector<int32_t> ids, ThreadPool& pool, Monitor& monitor);

  // Cost between two clusters, the same to the last bit in either order.
  virtual double cost(size_t i, size_t j) const = 0;

  // Nearest clusters by the lists, which are up to date; slot = -1 and a lower bound where they do not tell.
  virtual void decide(const std::vector<int32_t>& rows, std::vector<Neighbour>& found);

  // The same for a row that was scanned just now and whose list still does not tell.
  virtual void decide_scanned(int32_t, Neighbour&) {}

  // Makes new lists for the rows from scratch: `restart`, then `offer` for everything that costs at most `list_limit`,
  // then `close` where something was not offered.
  virtual void scan_rows(const std::vector<int32_t>& rows) = 0;

  // Unites the clusters of each pair; sizes_ still are those before.
  virtual void unite(const std::vector<Pair>& pairs) = 0;

  // Renumbers whatever the derived class keeps for a slot, as `compact` says.
  virtual void renumber(const std::vector<int32_t>& kept) = 0;

  const NeighbourList& list(size_t row) const { return lists_[row]; }
  void restart(size_t row, double bound);
  void offer(size_t row, size_t slot);
  double list_limit(size_t row) const;
  void close(size_t row);

  Method method_;
  ThreadPool& pool_;
  Monitor& monitor_;
  std::vector<double> sizes_;  // (slots,) members; 0 in an empty slot
  std::vector<int32_t> ids_;   // (slots,) an input row of the cluster: names it in the order of ties

 private:
  int32_t current(int32_t slot) const;
  Neighbour certified(size_t row) const;
  void refresh(size_t row);
  void merge_lists(const Pair& pair);

  double n_points_ = 0.0;
  std::vector<int32_t>
      forward_;  // (slots,) where a cluster went: itself, or towards the slot it merged into; -1 = left out
  std::vector<uint32_t> versions_;    // (slots,) counts the merges into a slot
  std::vector<NeighbourList> lists_;  // (slots,)
};

}  // namespace hiexp::clustering
