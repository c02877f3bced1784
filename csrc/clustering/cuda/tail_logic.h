// The last few clusters: all their costs as a matrix, then the nearest-neighbour chain in one go. Rounds find few pairs
// there, and every round costs a dozen launches whatever is left. Costs of merged clusters come from Lance-Williams
// updates instead of centroids, so heights may differ from those of rounds in the last places.
#pragma once

#include "clustering/cuda/round_logic.h"

namespace hiexp::clustering::device {

// So few clusters are left to rounds: one look of the host finishes them.
constexpr int32_t kTailLeast = 8;

// Row i of the matrix stands for the cluster in slot columns[i]; `listed` items a row. Each pair is computed once.
struct TailCosts {
  Clusters c;
  HIEXP_ANY_SIDE
  template <typename Octet>
  HIEXP_HD void operator()(const Octet& octet, int64_t item) const {
    const int64_t m = c.listed, i = item / m, j = item % m;
    if (j > i) return;
    const int32_t row = c.columns[i], column = c.columns[j];
    const double squares = octet.squared_distance(c.centroid(row), c.centroid(column), c.d);
    if (!octet.lead()) return;
    const double cost = i == j ? HUGE_VAL : c.cost(row, column, squares);
    c.matrix[i * m + j] = c.matrix[j * m + i] = cost;
  }
};

// A row of the matrix and what it costs some other row to merge with it; no row costs infinity.
struct Nearest {
  double cost;
  int32_t place;
};

// Cheaper neighbours of `tip` first. Among equals the tip's predecessor wins, so that costs along the chain fall
// strictly and it ends; then the hash decides, as elsewhere.
struct ChainOrder {
  const int32_t* columns;
  int32_t tip, before;

  HIEXP_HD uint64_t tie_key(int32_t place) const {
    return place == before ? 0 : pair_hash(columns[tip], columns[place]) | 1;
  }
  HIEXP_HD bool operator()(const Nearest& left, const Nearest& right) const {
    if (left.cost != right.cost) return left.cost < right.cost;
    if (left.cost == HUGE_VAL) return false;
    const uint64_t left_key = tie_key(left.place), right_key = tie_key(right.place);
    return left_key != right_key ? left_key < right_key : left.place < right.place;
  }
};

// Cost between the union of A and B (nearest to each other) and a cluster of n members. Rounding must not take it below
// both old costs: rows on the chain have chosen by those, and the chain could close a cycle.
HIEXP_HD inline double tail_update(Method method, double a, double b, double n, double to_a, double to_b,
                                   double cost_ab) {
  const double update = method == Method::ward ? ((a + n) * to_a + (b + n) * to_b - n * cost_ab) / (a + b + n)
                                               : merged_distance(method, a, b, to_a, to_b);
  return std::max(update, std::min(to_a, to_b));
}

// Block: the threads that run the chain together; rank, size, sync, and the least of their neighbours in some order.
// All of them hold the same depth, number of clusters left and number of merges; `work` holds the chain.
template <typename Block>
struct Chain {
  const Clusters& c;
  const Block& block;
  int32_t left, merges;
  uint32_t round;

  HIEXP_HD double* row(int32_t place) const { return c.matrix + int64_t{place} * c.listed; }

  HIEXP_ANY_SIDE
  HIEXP_HD Nearest nearest(int32_t tip, int32_t before) const {
    const ChainOrder closer{c.columns, tip, before};
    const double* costs = row(tip);
    Nearest best{HUGE_VAL, -1};
    for (int32_t k = block.rank(); k < c.listed; k += block.size()) {
      const Nearest candidate{costs[k], k};
      if (closer(candidate, best)) best = candidate;
    }
    return block.least(best, closer);
  }

  // Out of everyone's reach. A removed cluster's own row is never looked at again.
  HIEXP_ANY_SIDE
  HIEXP_HD void remove(int32_t place) {
    for (int32_t k = block.rank(); k < c.listed; k += block.size()) row(k)[place] = HUGE_VAL;
    if (block.rank() == 0) c.states[c.columns[place]] = State::empty;
    --left;
    block.sync();
  }

  // `keep` takes the union; its slot is the smaller one, as in rounds, because columns ascend.
  HIEXP_ANY_SIDE
  HIEXP_HD void merge(int32_t keep, int32_t drop, double cost) {
    const int32_t slot = c.columns[keep], other = c.columns[drop];
    const double a = c.sizes[slot], b = c.sizes[other];
    double* to_keep = row(keep);
    const double* to_drop = row(drop);
    for (int32_t k = block.rank(); k < c.listed; k += block.size()) {
      if (k == keep || k == drop || to_keep[k] == HUGE_VAL) continue;
      const double updated = tail_update(c.method, a, b, c.sizes[c.columns[k]], to_keep[k], to_drop[k], cost);
      to_keep[k] = row(k)[keep] = updated;
    }
    block.sync();  // sizes are read
    if (block.rank() == 0) {
      c.sizes[slot] = a + b;
      // A round of its own, so that records sorted by rounds stay in the order of the chain: children first.
      c.records[merges] = {slot, other, ++round, cost, 0.0};
    } else {
      ++round;
    }
    ++merges;
    remove(drop);
  }

  HIEXP_ANY_SIDE
  HIEXP_HD void push(int32_t depth, int32_t place) const {
    if (block.rank() == 0) c.work[depth] = place;
    block.sync();
  }

  HIEXP_ANY_SIDE
  HIEXP_HD void run() {
    int32_t depth = 0, start = 0;
    while (left > 1) {
      if (depth == 0) {
        while (c.states[c.columns[start]] == State::empty) ++start;
        push(depth++, start);
      }
      const int32_t tip = c.work[depth - 1], before = depth > 1 ? c.work[depth - 2] : -1;
      const Nearest best = nearest(tip, before);
      if (best.cost >= c.retire) {  // a chain of one: a predecessor within reach would have been nearer
        remove(tip);
        depth = 0;
      } else if (best.place == before) {
        merge(tip < before ? tip : before, tip < before ? before : tip, best.cost);
        depth -= 2;
      } else {
        push(depth++, best.place);
      }
    }
  }
};

HIEXP_ANY_SIDE
template <typename Block>
HIEXP_HD void finish_by_chain(const Clusters& c, const Block& block) {
  Chain<Block> chain{c, block, c.listed, c.counters->merges, c.counters->round};
  block.sync();  // the counters are read
  chain.run();
  if (block.rank() != 0) return;
  c.counters->merges = chain.merges;
  c.counters->alive = chain.left;
}

}  // namespace hiexp::clustering::device
