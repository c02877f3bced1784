// Scans, step by step: which rows to scan when a round found no pair, and what to make of their candidates.
#pragma once

#include "clustering/cuda/round_logic.h"

namespace hiexp::clustering::device {

// A scan may take this many clusters (one tile costs what one row costs), and more for each merge since the last one.
constexpr int kFreeScans = kTile;
constexpr int kScansPerMerge = 8;

struct BeginScan {
  Clusters c;
  HIEXP_HD void operator()(int64_t) const {
    Counters& now = *c.counters;
    now.searching = now.merges == now.pair_begin && now.alive > 1;
    now.demanded = now.scan = now.exact = 0;
    now.least_demand = now.least_edge = kNoKey;
    now.demand_slot = now.edge_slot = kNoSlot;
    ++now.scans;
  }
};

// Costs are not negative, so their bits are in their order.
HIEXP_HD inline Word order_of(double cost) { return bits_as<Word>(cost + 0.0); }

HIEXP_HD inline bool demands(const Clusters& c, int32_t i) {
  return c.states[i] == State::certified && c.nearest[i] >= 0 && c.states[c.nearest[i]] == State::open;
}

// Scans are by demand: only clusters that a certified one points to.
struct Demand {
  Clusters c;
  HIEXP_HD void operator()(int64_t p) const {
    const int32_t i = c.columns[p];
    if (c.counters->searching == 0 || c.states[i] != State::certified || c.nearest[i] < 0) return;
    atomic_min(&c.counters->least_edge, order_of(c.nearest_costs[i]));
    if (!demands(c, i)) return;
    atomic_min(&c.counters->least_demand, order_of(c.nearest_costs[i]));
    const int32_t j = c.nearest[i];
    if (atomic_exchange(c.wanted + j, c.counters->scans) != c.counters->scans) {
      c.scan[atomic_add(&c.counters->demanded, 1)] = j;
    }
  }
};

// Without demand every open cluster is scanned. Otherwise finds who is wanted most.
struct DemandMost {
  Clusters c;
  HIEXP_HD void operator()(int64_t p) const {
    const int32_t i = c.columns[p];
    Counters& now = *c.counters;
    if (now.searching == 0) return;
    if (now.demanded == 0 && c.states[i] == State::open) c.scan[atomic_add(&now.scan, 1)] = i;
    if (c.states[i] != State::certified || c.nearest[i] < 0) return;
    const Word order = order_of(c.nearest_costs[i]);
    if (order == now.least_edge) atomic_min(&now.edge_slot, i);
    if (order == now.least_demand && demands(c, i)) atomic_min(&now.demand_slot, c.nearest[i]);
  }
};

// When scans pay badly (many scans, few merges: chains and stars), only the cluster wanted at the least cost is
// scanned: its own neighbour costs no more, so the next one wanted most continues a single descending chain, and a
// merge is a few scans away. Where neither pairs nor open clusters are left, rounding closed a cycle of neighbours
// whose costs differ in the last place: the cheapest edge of all is the right merge then.
struct LimitScan {
  Clusters c;
  HIEXP_HD void operator()(int64_t) const {
    Counters& now = *c.counters;
    if (now.searching == 0) return;
    if (now.demanded > 0) {
      const int64_t merged = now.merges - now.merges_at_scan;
      const bool few = now.demanded <= kFreeScans + kScansPerMerge * merged;
      if (!few) c.scan[0] = now.demand_slot;
      now.scan = few ? now.demanded : 1;
      now.merges_at_scan = now.merges;
    }
    if (now.scan == 0) {
      now.forced = now.edge_slot;
      now.forced_round = now.round + 1;
    }
    now.scanned += static_cast<Word>(now.scan);
    now.pairs += static_cast<Word>(now.scan) * static_cast<Word>(now.alive);
  }
};

// The first pass scans every row.
struct ScanAll {
  Clusters c;
  HIEXP_HD void operator()(int64_t p) const {
    c.scan[p] = c.columns[p];
    if (p > 0) return;
    Counters& now = *c.counters;
    now.scan = c.listed;
    now.exact = 0;
    now.scanned += static_cast<Word>(c.listed);
    now.pairs += static_cast<Word>(c.listed) * static_cast<Word>(c.listed - 1);
  }
};

// Where low precision cannot rank the candidates (ties, tiny gaps), the whole row is computed in float64.
struct FinishScan {
  Clusters c;
  HIEXP_HD void operator()(int64_t w) const {
    const int32_t row = c.scan[w];
    settle(c, row);
    if (c.states[row] == State::open) {
      c.exact[atomic_add(&c.counters->exact, 1)] = row;
    } else {
      atomic_add(&c.counters->certified, Word{1});
    }
  }
};

struct FinishExact {
  Clusters c;
  HIEXP_HD void operator()(int64_t w) const { settle(c, c.exact[w]); }
};

struct CountExact {
  Clusters c;
  HIEXP_HD void operator()(int64_t) const {
    const auto rows = static_cast<Word>(c.counters->exact);
    c.counters->exact_rows += rows;
    c.counters->pairs += rows * static_cast<Word>(c.counters->alive);
  }
};

// A list from sorted candidates; the last of kKeep bounds everything that is not listed. Lane x stores candidate x.
HIEXP_HD inline void store(const Clusters& c, int32_t row, int x, const Approximate& candidate) {
  if (x < kList) c.list(row)[x] = {candidate.slot, kPending, 0.0};
  if (x == kList) c.list_bounds[row] = static_cast<double>(candidate.cost);
}
HIEXP_HD inline void store(const Clusters& c, int32_t row, int x, const Exact& candidate) {
  if (x < kList) c.list(row)[x] = {candidate.slot, candidate.slot < 0 ? 0 : c.versions[candidate.slot], candidate.cost};
  if (x == kList) c.list_bounds[row] = candidate.cost;
}

HIEXP_HD inline bool comes_before(const Approximate& left, const Approximate& right, int32_t) {
  return left.cost < right.cost || (left.cost == right.cost && left.slot < right.slot);
}
HIEXP_HD inline bool comes_before(const Exact& left, const Exact& right, int32_t row) {
  return Rank{left.cost, pair_hash(row, left.slot), left.slot} <
         Rank{right.cost, pair_hash(row, right.slot), right.slot};
}

template <typename Candidate>
HIEXP_HD inline Candidate no_candidate() {
  Candidate none;
  none.cost = static_cast<decltype(none.cost)>(HUGE_VAL);
  none.slot = -1;
  return none;
}

// Few rows: the columns are split, so that every block has work. Item = block of rows x range of columns.
struct Splits {
  int64_t rows, columns, blocks, splits;

  static HIEXP_HD Splits of(int64_t rows, int64_t rows_per_block, int64_t columns, int64_t columns_per_tile,
                            int64_t grid) {
    const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
    const int64_t tiles = (columns + columns_per_tile - 1) / columns_per_tile;
    int64_t splits = blocks > 0 ? grid / blocks : 1;
    splits = splits > tiles ? tiles : splits;
    return {rows, columns, blocks, splits > 1 ? splits : 1};
  }
  HIEXP_HD int64_t items() const { return blocks * splits; }
  // First tile of a split, of `tiles` tiles.
  HIEXP_HD int64_t begin(int64_t split, int64_t tiles) const { return split * tiles / splits; }
};

}  // namespace hiexp::clustering::device
