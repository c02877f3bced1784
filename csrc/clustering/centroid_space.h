// Clusters kept as centroids, O(n d) memory: ward, and average and weighted over squared distances or cosine.
#pragma once

#include <vector>

#include "clustering/monitor.h"
#include "clustering/neighbour_list.h"
#include "clustering/panels.h"
#include "clustering/points.h"
#include "clustering/space.h"

namespace hiexp::clustering {

class CentroidSpace : public Space {
 public:
  // has_centroids(method, metric); cosine expects unit rows.
  CentroidSpace(Points points, Method method, Metric metric, ThreadPool& pool, Monitor& monitor);

  size_t slots() const override { return sizes_.size(); }
  std::vector<Neighbour> nearest(const std::vector<int32_t>& rows, bool scan) override;
  void merge(const std::vector<Pair>& pairs) override;
  void compact(const std::vector<int32_t>& kept) override;
  double height(double cost) const override;

 private:
  double cost(size_t i, size_t j) const;
  const double* centroid(size_t i) const { return centroids_.data() + i * d_; }
  int32_t current(int32_t slot) const;
  void refresh(size_t row);
  ListEntry moved(ListEntry entry, int32_t slot, double bound) const;
  Neighbour certified(size_t row);
  void merge_centroids(const Pair& pair);
  void merge_lists(const Pair& pair);
  void count_scan(size_t rows, bool all);
  void scan_rows(const std::vector<int32_t>& rows);
  void scan_exactly(const std::vector<int32_t>& rows);
  void offer_bound(size_t row, size_t slot, double bound);

  Method method_;
  Metric metric_;
  ThreadPool& pool_;
  Monitor& monitor_;
  size_t d_;
  double n_points_ = 0.0;
  int exponent_;
  std::vector<double> centroids_;  // (slots, d)
  std::vector<double> sizes_;      // (slots,) members; 0 in an empty slot
  std::vector<double> spreads_;    // (slots,) mean squared distance of the members to the centroid; 0 for ward
  std::vector<int32_t> ids_;       // (slots,) an input row of the cluster: names it in the order of ties
  std::vector<int32_t>
      forward_;  // (slots,) where a cluster went: itself, or towards the slot it merged into; -1 = left out
  std::vector<uint32_t> versions_;    // (slots,) counts the merges into a slot
  std::vector<NeighbourList> lists_;  // (slots,)
  Panels panels_;
  bool scanned_before_ = false;
};

}  // namespace hiexp::clustering
