// One round of reciprocal nearest neighbours, step by step, as rounds.cpp and centroid_space.cpp do it: each struct is
// one step, its operator() handles one slot, one row of a list or one pair. Steps meet only through memory, so all of
// them run on the device one after another and the host need not look. Orders of lists filled with atomics do not
// matter: every decision depends on costs, hashes and slots alone.
#pragma once

#include "clustering/cuda/clusters.h"
#include "clustering/cuda/prepare_logic.h"
#include "clustering/list_logic.h"

namespace hiexp::clustering::device {

HIEXP_HD inline Rank rank_of(int32_t row, const Entry& entry) {
  return {entry.cost, pair_hash(row, entry.slot), entry.slot};
}

// Settles a cluster whose list holds exact costs: its nearest neighbour if nothing unlisted can be cheaper, else a
// lower bound. Beyond the threshold it is retired: no partner is left for it, nor is it anyone's.
HIEXP_HD inline void settle(const Clusters& c, int32_t row) {
  Rank best{HUGE_VAL, 0, -1};
  for (int x = 0; x < c.counts[row]; ++x) {
    const Rank rank = rank_of(row, c.list(row)[x]);
    if (best.slot < 0 || rank < best) best = rank;
  }
  const bool certain = best.cost <= c.list_bounds[row] * kTie;
  c.nearest[row] = certain ? best.slot : -1;
  c.nearest_costs[row] = certain ? best.cost : c.list_bounds[row];
  c.states[row] = certain ? State::certified : State::open;
  if (c.retire < HUGE_VAL && c.nearest_costs[row] >= c.retire) {
    c.states[row] = State::empty;
    remove_from_scans(c, row);
    atomic_add(&c.counters->alive, -1);
  }
}

HIEXP_HD inline bool listed_before(const Entry* entries, int count, int32_t slot) {
  for (int x = 0; x < count; ++x) {
    if (entries[x].slot == slot) return true;
  }
  return false;
}

struct BeginRound {
  Clusters c;
  HIEXP_HD void operator()(int64_t) const {
    ++c.counters->round;
    c.counters->work = 0;
    c.counters->pair_begin = c.counters->merges;
  }
};

struct Collect {
  Clusters c;
  HIEXP_HD void operator()(int64_t p) const {
    const int32_t slot = c.columns[p];
    // Halves the path to where the cluster went. Others may do so at once: every value seen lies on the path.
    c.forward[slot] = c.forward[c.forward[slot]];
    c.claims[slot] = kNoKey;
    if (c.states[slot] == State::stale) c.work[atomic_add(&c.counters->work, 1)] = slot;
  }
};

// Entries follow their clusters; those whose cost changed wait for it; twins, the row itself and retired clusters go.
struct Refresh {
  Clusters c;
  HIEXP_HD void operator()(int64_t w) const {
    const int32_t row = c.work[w];
    Entry* entries = c.list(row);
    int kept = 0;
    for (int x = 0; x < c.counts[row]; ++x) {
      Entry entry = entries[x];
      const int32_t slot = c.current(entry.slot);
      if (slot == row || c.states[slot] == State::empty) continue;
      if (slot != entry.slot || c.versions[slot] != entry.stamp) {
        if (listed_before(entries, kept, slot)) continue;
        entry = {slot, kPending, 0.0};
      }
      entries[kept++] = entry;
    }
    c.counts[row] = kept;
  }
};

// Octet: eight lanes that share one squared distance; lead() is true in one of them.
HIEXP_ANY_SIDE
template <typename Octet>
HIEXP_HD inline void fill_cost(const Clusters& c, const Octet& octet, int32_t row, Entry& entry) {
  if (entry.slot < 0 || entry.stamp != kPending) return;
  const double squares = octet.squared_distance(c.centroid(row), c.centroid(entry.slot), c.d);
  if (!octet.lead()) return;
  entry.cost = c.cost(row, entry.slot, squares);
  entry.stamp = c.versions[entry.slot];
}

// kList items a row of `rows`.
struct RowCosts {
  Clusters c;
  const int32_t* rows;
  HIEXP_ANY_SIDE
  template <typename Octet>
  HIEXP_HD void operator()(const Octet& octet, int64_t item) const {
    const int32_t row = rows[item / kList];
    const auto x = static_cast<int>(item % kList);
    if (x < c.counts[row]) fill_cost(c, octet, row, c.list(row)[x]);
  }
};

struct Settle {
  Clusters c;
  HIEXP_HD void operator()(int64_t w) const { settle(c, c.work[w]); }
};

// A pair may merge when both costs agree (not only when both name each other: equal costs could close a cycle).
HIEXP_HD inline bool may_merge(const Clusters& c, int32_t i) {
  const int32_t j = c.nearest[i];
  if (c.states[i] != State::certified || j < 0 || c.states[j] != State::certified) return false;
  const bool forced = c.counters->forced == i && c.counters->forced_round == c.counters->round;
  return forced || c.nearest_costs[i] == c.nearest_costs[j];
}

HIEXP_HD inline Word pair_key(int32_t i, int32_t j) {
  const int32_t low = i < j ? i : j, high = i < j ? j : i;
  return (static_cast<Word>(low) << 32) | static_cast<Word>(high);
}

// Equal costs may offer several partners: a pair merges if it holds the smallest claim on both its clusters.
struct Claim {
  Clusters c;
  HIEXP_HD void operator()(int64_t p) const {
    const int32_t i = c.columns[p];
    if (!may_merge(c, i)) return;
    const Word key = pair_key(i, c.nearest[i]);
    atomic_min(c.claims + i, key);
    atomic_min(c.claims + c.nearest[i], key);
  }
};

struct TakePairs {
  Clusters c;
  HIEXP_HD void operator()(int64_t p) const {
    const int32_t i = c.columns[p];
    if (!may_merge(c, i)) return;
    const int32_t j = c.nearest[i];
    const Word key = pair_key(i, j);
    if (c.claims[i] != key || c.claims[j] != key) return;
    if (c.nearest[j] == i && j < i) return;  // j records the pair
    const int32_t keep = i < j ? i : j, drop = i < j ? j : i;
    c.records[atomic_add(&c.counters->merges, 1)] = {keep, drop, c.counters->round, c.nearest_costs[i], 0.0};
    c.touched[keep] = c.touched[drop] = c.counters->round;
    atomic_add(&c.counters->alive, -1);
  }
};

struct PairSquares {
  Clusters c;
  HIEXP_ANY_SIDE
  template <typename Octet>
  HIEXP_HD void operator()(const Octet& octet, int64_t r) const {
    Record& pair = c.records[r];
    const double squares = octet.squared_distance(c.centroid(pair.keep), c.centroid(pair.drop), c.d);
    if (octet.lead()) pair.squares = squares;
  }
};

struct MergeCentroids {
  Clusters c;
  HIEXP_ANY_SIDE
  template <typename Team>
  HIEXP_HD void operator()(const Team& team, int64_t r) const {
    const Record pair = c.records[r];
    const int32_t a = pair.keep, b = pair.drop;
    const double size_a = c.sizes[a], size_b = c.sizes[b], share = mean_share(c.method, size_a, size_b);
    double* target = c.centroid(a);
    const double* other = c.centroid(b);
    for (int k = team.rank(); k < c.d; k += team.size()) target[k] += share * (other[k] - target[k]);
    team.sync();
    if (team.rank() == 0) {
      c.list_bounds[a] =
          merged_bound(c.method, size_a, size_b, c.list_bounds[a], c.list_bounds[b], pair.cost, 1.0, c.points);
      if (c.method != Method::ward) {
        c.spreads[a] += share * (c.spreads[b] - c.spreads[a]) + share * (1.0 - share) * pair.squares;
      }
      c.sizes[a] = size_a + size_b;
      c.sizes[b] = 0.0;
      c.forward[b] = a;
      ++c.versions[a];
      remove_from_scans(c, b);
    }
    team.sync();
    encode_row(c, team, a);
  }
};

// The lists of both clusters, one after the other; the list of the second becomes free.
HIEXP_HD inline Entry& joint_entry(const Clusters& c, const Record& pair, int x) {
  return x < kList ? c.list(pair.keep)[x] : c.list(pair.drop)[x - kList];
}

HIEXP_HD inline bool in_joint_list(const Clusters& c, const Record& pair, int count, int32_t slot) {
  for (int x = 0; x < count; ++x) {
    if (joint_entry(c, pair, x).slot == slot) return true;
  }
  return false;
}

// All centroids of the round are merged by now; every cost to the new cluster is new.
struct JoinLists {
  Clusters c;
  HIEXP_HD void operator()(int64_t r) const {
    const Record pair = c.records[r];
    for (int x = 0; x < 2 * kList; ++x) {
      Entry& entry = joint_entry(c, pair, x);
      const bool filled = x < kList ? x < c.counts[pair.keep] : x - kList < c.counts[pair.drop];
      const int32_t slot = filled ? c.current(entry.slot) : -1;
      const bool usable =
          filled && slot != pair.keep && c.states[slot] != State::empty && !in_joint_list(c, pair, x, slot);
      entry = {usable ? slot : -1, kPending, HUGE_VAL};
    }
  }
};

// 2 kList items a pair.
struct JointCosts {
  Clusters c;
  HIEXP_ANY_SIDE
  template <typename Octet>
  HIEXP_HD void operator()(const Octet& octet, int64_t item) const {
    const Record pair = c.records[item / (2 * kList)];
    fill_cost(c, octet, pair.keep, joint_entry(c, pair, static_cast<int>(item % (2 * kList))));
  }
};

// Sorts the joint list; what does not fit lowers the bound.
struct FinishMerge {
  Clusters c;
  HIEXP_HD void operator()(int64_t r) const {
    const Record pair = c.records[r];
    const int32_t row = pair.keep;
    int count = 0;
    for (int x = 0; x < 2 * kList; ++x) {
      const Entry entry = joint_entry(c, pair, x);
      if (entry.slot < 0) continue;
      int place = count++;
      for (; place > 0 && rank_of(row, entry) < rank_of(row, joint_entry(c, pair, place - 1)); --place) {
        joint_entry(c, pair, place) = joint_entry(c, pair, place - 1);
      }
      joint_entry(c, pair, place) = entry;
    }
    if (count > kList) {
      const double dropped = joint_entry(c, pair, kList).cost;
      if (dropped < c.list_bounds[row]) c.list_bounds[row] = dropped;
    }
    c.counts[row] = count < kList ? count : kList;
    c.counts[pair.drop] = 0;
    c.states[row] = State::stale;
    c.states[pair.drop] = State::empty;
  }
};

// Clusters whose nearest neighbour merged must look again.
struct MarkLost {
  Clusters c;
  HIEXP_HD void operator()(int64_t p) const {
    const int32_t slot = c.columns[p];
    if (c.states[slot] != State::certified || c.nearest[slot] < 0) return;
    if (c.touched[c.nearest[slot]] == c.counters->round) c.states[slot] = State::stale;
  }
};

// Once every compaction, over all slots: makes every path one step shorter than half as long.
struct HalvePaths {
  Clusters c;
  HIEXP_HD void operator()(int64_t slot) const { c.forward[slot] = c.forward[c.forward[slot]]; }
};

}  // namespace hiexp::clustering::device
