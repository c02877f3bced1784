// All clusters of a run as plain arrays in one block of memory: device memory under CUDA, heap memory in the emulation.
// A cluster lives in the slot of its first row for good; slots are never renumbered, only the list of live ones
// shrinks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "clustering/cuda/low_precision.h"
#include "clustering/method.h"

namespace hiexp::clustering::device {

using Word = unsigned long long;  // the 64-bit type CUDA's atomics know

constexpr int kList = 16;
constexpr int kKeep = kList + 1;              // the last one only bounds what is not listed
constexpr int kDepthStep = 32;                // halves of a row that a tile of the candidate pass loads at once
constexpr int kTile = 128;                    // rows and columns of such a tile
constexpr int kCostRows = 4;                  // rows that share a block's loads in a float64 scan
constexpr int32_t kTailClusters = 2048;       // finished with a matrix: 32 MiB, within the L2 of an A100 or H100
constexpr int kParts = 256;                   // partial results of a reduction over rows
constexpr uint32_t kPending = 0xffffffffu;    // stamp of a list entry whose cost is not known yet
constexpr int32_t kNoSlot = 0x7fffffff;       // larger than any slot
constexpr Word kNoKey = 0xffffffffffffffffu;  // larger than any key

enum class State : uint8_t { empty, stale, open, certified };

struct Record {
  int32_t keep, drop;
  uint32_t round;
  double cost, squares;

  // The order of rounds and slots, whatever order the device wrote them in.
  bool operator<(const Record& other) const { return round != other.round ? round < other.round : keep < other.keep; }
};

inline bool runs_on_device(Method method, Metric metric) {
  return has_centroids(method, metric) &&
         (method != Method::ward || metric == Metric::euclidean || metric == Metric::cosine);
}

// The edge of a threshold is decided on heights at the end; here a cluster must be safely above it.
constexpr double kRetireMargin = 1.0 + 1e-9;

// The cost that centroid_height turns into the threshold, on the safe side; small ones may have underflowed.
inline double retire_cost(Method method, Metric metric, double threshold, int exponent) {
  if (threshold == kInfinity) return kInfinity;
  const bool root = method == Method::ward;
  const double scaled = std::ldexp(threshold * kRetireMargin, root ? -exponent : -2 * exponent);
  const double cost = root ? scaled * scaled : scaled * (metric == Metric::cosine ? 2.0 : 1.0);
  return std::max(cost * (1.0 + 1e-12), 1e-290);
}

// A cluster in a list; its cost is exact, and belongs to that version of the cluster.
struct Entry {
  int32_t slot;
  uint32_t stamp;
  double cost;
};

// A candidate with a lower bound on its cost, and one with the cost itself.
struct Approximate {
  float cost;
  int32_t slot;
};
struct Exact {
  double cost;
  int32_t slot;
};

// Everything a round decides on; the host reads it once every few rounds.
struct Counters {
  int32_t alive, work, pair_begin, merges;        // pairs of this round are records [pair_begin, merges)
  int32_t demanded, scan, exact, merges_at_scan;  // rows wanted by others, to scan, to scan in float64
  int32_t searching, demand_slot, edge_slot,
      forced;  // forced: this slot merges with its neighbour whatever that thinks
  uint32_t round, forced_round, scans, padding;
  Word least_demand, least_edge;   // bits of costs
  Word first_bad, first_zero_row;  // smallest index of a value that is not finite, of a row of zeros
  Word scanned, certified, exact_rows, pairs;
};

struct Clusters {
  int32_t n, d, depth, listed;  // rows; padded coordinates in float64, in half precision; entries of `columns`
  Method method;
  double points;  // rows, duplicates included
  double retire;  // clusters whose neighbours cost this much or more never merge below the threshold
  int32_t grid;   // blocks of a scan
  int32_t tail;   // so many clusters, or fewer, are finished by the chain of tail_logic.h

  double *centroids, *centre;              // (n, d), (d,)
  double *parts, *low, *high;              // (2, kParts, d), (d,), (d,)
  uint16_t* halves;                        // (n, depth)
  RowBound* bounds;                        // (n,)
  double *sizes, *spreads, *list_bounds;   // (n,)
  double* nearest_costs;                   // (n,)
  int32_t *nearest, *forward, *counts;     // (n,)
  uint32_t *versions, *touched, *wanted;   // (n,)
  Word* claims;                            // (n,)
  State* states;                           // (n,)
  Entry* entries;                          // (n, kList)
  int32_t *columns, *work, *scan, *exact;  // (n,)
  Record* records;                         // (n,)
  Approximate* approximate_parts;          // (grid, kTile, kKeep)
  Exact* exact_parts;                      // (grid, kCostRows, kKeep)
  double* matrix;                          // (tail, tail)
  Counters* counters;

  HIEXP_HD double* centroid(int64_t slot) const { return centroids + slot * d; }
  HIEXP_HD Entry* list(int64_t slot) const { return entries + slot * kList; }
  // Where a cluster went; chains of merges are short, because every round halves them.
  HIEXP_HD int32_t current(int32_t slot) const {
    while (forward[slot] != slot) slot = forward[slot];
    return slot;
  }
  HIEXP_HD double cost(int32_t i, int32_t j, double squares) const {
    return method == Method::ward ? ward_weight(sizes[i], sizes[j]) * squares : squares + (spreads[i] + spreads[j]);
  }
};

// Items [*first, *last), or [0, most) without pointers; `most` bounds their number in any case.
struct Span {
  const int32_t* first;
  const int32_t* last;
  int64_t most;

  HIEXP_HD int64_t begin() const { return first != nullptr ? *first : 0; }
  HIEXP_HD int64_t end() const { return last != nullptr ? *last : most; }
};

// Hands out pieces of one block, or only measures when there is none.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  void take(T*& target, size_t count) {
    target = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 255) / 256 * 256;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Shapes and pieces of a run over (n, d) rows; returns the bytes it needs. With base = nullptr it only measures.
inline size_t lay_out(Clusters& c, void* base, size_t n, size_t d, int grid, int32_t tail = kTailClusters) {
  c.n = static_cast<int32_t>(n);
  c.d = static_cast<int32_t>((d + 7) / 8 * 8);
  c.depth = static_cast<int32_t>((d + kDepthStep - 1) / kDepthStep * kDepthStep);
  c.listed = c.n;
  c.grid = grid;
  c.tail = std::min(tail, c.n);
  const auto width = static_cast<size_t>(c.d), blocks = static_cast<size_t>(grid);
  Arena arena(base);
  arena.take(c.counters, 1);
  arena.take(c.centroids, n * width);
  arena.take(c.centre, width);
  arena.take(c.parts, 2 * kParts * width);
  arena.take(c.low, width);
  arena.take(c.high, width);
  arena.take(c.halves, n * static_cast<size_t>(c.depth));
  arena.take(c.bounds, n);
  for (double** piece : {&c.sizes, &c.spreads, &c.list_bounds, &c.nearest_costs}) arena.take(*piece, n);
  for (int32_t** piece : {&c.nearest, &c.forward, &c.counts, &c.columns, &c.work, &c.scan, &c.exact}) {
    arena.take(*piece, n);
  }
  for (uint32_t** piece : {&c.versions, &c.touched, &c.wanted}) arena.take(*piece, n);
  arena.take(c.claims, n);
  arena.take(c.states, n);
  arena.take(c.entries, n * kList);
  arena.take(c.records, n);
  arena.take(c.approximate_parts, blocks * kTile * kKeep);
  arena.take(c.exact_parts, blocks * kCostRows * kKeep);
  arena.take(c.matrix, static_cast<size_t>(c.tail) * static_cast<size_t>(c.tail));
  return arena.used();
}

}  // namespace hiexp::clustering::device
