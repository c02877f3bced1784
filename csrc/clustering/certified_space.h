// Complete linkage over a float32 matrix, 2 n^2 bytes, with exact decisions and float64 heights.
#pragma once

#include <stdexcept>
#include <vector>

#include "clustering/float_distances.h"
#include "clustering/matrix_space.h"

namespace hiexp::clustering {

// Thrown where float32 cannot tell so many distances apart that a float64 matrix is cheaper.
struct TooClose : std::runtime_error {
  TooClose() : std::runtime_error("distances too close for float32") {}
};

// The matrix holds lower bounds. The largest entry of two clusters is a lower bound on their distance, and the widest
// interval of their points bounds the error: float32 decides where intervals do not meet, else the distances in
// question are computed from the points.
class CertifiedSpace : public MatrixSpace<float> {
 public:
  CertifiedSpace(Triangle<float> triangle, FloatDistances distances, std::vector<double> sizes,
                 std::vector<int32_t> ids, std::function<double(double)> height, ThreadPool& pool, Monitor& monitor);

  bool exact_costs() const override { return false; }
  void settle(std::vector<Pair>& pairs) override;

 private:
  void decide(const std::vector<int32_t>& rows, std::vector<Neighbour>& found) override;
  void decide_scanned(int32_t row, Neighbour& found) override;
  void unite(const std::vector<Pair>& pairs) override;
  void renumber(const std::vector<int32_t>& kept) override;

  struct Choice {
    size_t row;
    std::vector<int32_t> slots;
  };
  Choice choices(size_t row, Neighbour& found) const;
  void choose(const std::vector<Choice>& choices, const std::vector<Neighbour*>& found);
  void spend(const std::vector<Pair>& pairs);

  FloatDistances distances_;
  std::vector<std::vector<int32_t>> members_;  // (slots) points of a cluster
  std::vector<double> widths_;                 // (slots,) largest of its points
  double budget_;                              // pairs of points left to compute for decisions
};

}  // namespace hiexp::clustering
