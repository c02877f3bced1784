// Squared distances from float32 products with a proven error, and exact largest distances between sets of points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clustering/monitor.h"
#include "clustering/points.h"
#include "clustering/triangle.h"

namespace hiexp::clustering {

class FloatDistances {
 public:
  // Refers to the points, and keeps a float32 copy.
  FloatDistances(const Points& points, ThreadPool& pool);

  // Lower bounds on all squared distances; none is off by more than width(i) + width(j).
  void fill(Triangle<float>& triangle, ThreadPool& pool, Monitor& monitor) const;
  double width(size_t i) const { return widths_[i]; }

  // Largest squared distance of a point of `a` to one of `b`, in float64 accuracy. It is known to be at least `floor`.
  // `pool` may be null: inside a task.
  double farthest(const std::vector<int32_t>& a, const std::vector<int32_t>& b, double floor, ThreadPool* pool) const;

 private:
  void fill_block(size_t first, Triangle<float>& triangle) const;
  void pack(const int32_t* points, size_t count, size_t width, float* out) const;
  double farthest_of_block(const int32_t* a, size_t count, const std::vector<int32_t>& b, const float* panels,
                           double floor) const;

  const Points& points_;
  std::vector<float> storage_;
  float* panels_;               // (panels, d, kPanelColumns), 64-byte aligned
  std::vector<float> q_;        // (panels * kPanelColumns,) squared norm less the error
  std::vector<double> widths_;  // (n,)
};

}  // namespace hiexp::clustering
