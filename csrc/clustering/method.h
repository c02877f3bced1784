// Linkage methods, metrics and their update formulas, shared by every backend.
//
// A "cost" is the quantity the algorithms compare; height_of_cost turns it into the height of the dendrogram:
//   centroid methods  cost = 2ab/(a+b) |c_A - c_B|^2 (ward) or |m_A - m_B|^2 + v_A + v_B (average, weighted), the mean
//                     squared distance of a member of A to one of B: v = mean squared distance of the members to their
//                     mean m. On unit vectors cost / 2 = 1 - <m_A, m_B>. For weighted the mean gives the two clusters
//                     of the last merge half the weight each, and so on down: m = (m_A + m_B) / 2,
//                     v = (v_A + v_B) / 2 + |m_A - m_B|^2 / 4.
//   matrix methods    cost = the distance itself
// All methods are reducible: d(A+B, C) >= min(d(A, C), d(B, C)) whenever d(A, B) is the smallest of the three.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "clustering/host_device.h"

namespace hiexp::clustering {

enum class Method { ward, average, weighted, complete, single };
enum class Metric { euclidean, sqeuclidean, cosine, manhattan };

// Whether clusters can be kept as centroids, O(n d) memory: distances follow from means then.
inline bool has_centroids(Method method, Metric metric) {
  const bool square = metric == Metric::cosine || metric == Metric::sqeuclidean;
  return method == Method::ward || ((method == Method::average || method == Method::weighted) && square);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Two clusters that merge: `keep` holds the union afterwards, `drop` is gone.
struct Pair {
  int32_t keep;
  int32_t drop;
  double cost;
};

// The nearest cluster of some cluster; slot is -1 while unknown.
struct Neighbour {
  int32_t slot = -1;
  double cost = kInfinity;
};

// One row of the dendrogram before it is sorted: two leaves that stand for their clusters.
struct Merge {
  int32_t a;
  int32_t b;
  double height;
};

// Height in the dendrogram of a merge at `cost` in a centroid method, distances being scaled by 2^-exponent.
inline double centroid_height(Method method, Metric metric, int exponent, double cost) {
  if (method == Method::ward) return std::ldexp(std::sqrt(cost), exponent);
  return std::ldexp(metric == Metric::cosine ? cost / 2.0 : cost, 2 * exponent);
}

HIEXP_HD inline double ward_weight(double a, double b) { return 2.0 * a * b / (a + b); }

// Lance-Williams update of the matrix methods: distance of the union of clusters with a and b members to a third one.
HIEXP_HD inline double merged_distance(Method method, double a, double b, double to_a, double to_b) {
  if (method == Method::complete) return std::max(to_a, to_b);
  if (method == Method::single) return std::min(to_a, to_b);
  return method == Method::weighted ? (to_a + to_b) / 2.0 : (a * to_a + b * to_b) / (a + b);
}

// Share of B in the mean of the union of A and B.
HIEXP_HD inline double mean_share(Method method, double a, double b) {
  return method == Method::weighted ? 0.5 : b / (a + b);
}

// Every merge takes bounds through arithmetic; the first factor covers its rounding. Costs within the second factor
// count as equal: centroids and sums of squares are rounded by as much. Without it the bounds would not survive a merge
// where many distances tie, and every merge would need a scan.
constexpr double kBoundSlack = 1.0 - 2e-15;
constexpr double kTie = 1.0 + 5e-14;

// Lower bound on the cost between the union of A and B and a cluster of n_low to n_high members that costs at least
// bound_a from A and bound_b from B. Ward's update depends on the third cluster's size through a Moebius function,
// monotone in it, so the ends bound it. Reducibility gives a second bound.
HIEXP_HD inline double merged_bound(Method method, double a, double b, double bound_a, double bound_b, double cost_ab,
                                    double n_low, double n_high) {
  const double smaller = std::min(bound_a, bound_b);
  if (smaller == kInfinity) return kInfinity;
  double update = merged_distance(method, a, b, bound_a, bound_b);
  if (method == Method::ward) {
    update = kInfinity;
    for (const double n : {n_low, n_high}) {
      update = std::min(update, ((a + n) * bound_a + (b + n) * bound_b - n * cost_ab) / (a + b + n));
    }
  }
  return std::max(update, smaller) * kBoundSlack;
}

// Order of equally distant pairs: symmetric, and scattered so that equal distances everywhere do not all point to one
// cluster (a lowest-index rule needs n - 1 rounds on them). The constants are those of splitmix64.
HIEXP_HD inline uint64_t pair_hash(int32_t i, int32_t j) {
  uint64_t x = (static_cast<uint64_t>(std::min(i, j)) << 32) | static_cast<uint32_t>(std::max(i, j));
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace hiexp::clustering
