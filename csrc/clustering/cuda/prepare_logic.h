// From input rows to clusters of one row each, step by step: each struct is one step, its operator() handles one row,
// coordinate or part. The values equal those of points.cpp bit by bit: load, normalise (cosine), collapse equal rows,
// shift where that is exact, scale by a power of two. The half-precision copies follow.
#pragma once

#include "clustering/cuda/clusters.h"

namespace hiexp::clustering::device {

struct Half {
  uint16_t bits;
};

template <typename Scalar>
HIEXP_HD inline double to_double(Scalar value) {
  return static_cast<double>(value);
}
HIEXP_HD inline double to_double(Half value) { return static_cast<double>(float_of(value.bits)); }

HIEXP_HD inline Word hash_row(const double* row, int d) {
  uint64_t hash = 0x9e3779b97f4a7c15ULL;
  for (int k = 0; k < d; ++k) {
    hash = (hash ^ bits_as<uint64_t>(row[k])) * 0x94d049bb133111ebULL;
    hash ^= hash >> 29;
  }
  return hash;
}

// Duplicates are found in a hash table that lives where the neighbour lists will.
struct Table {
  Word* hashes;    // (n,)
  int32_t* slots;  // (mask + 1,) smallest row of each group of equal rows, or -1
  Word mask;

  static HIEXP_HD Table of(const Clusters& c) {
    Word places = 2;
    while (places < 2 * static_cast<Word>(c.n)) places *= 2;
    auto* hashes = reinterpret_cast<Word*>(c.entries);
    return {hashes, reinterpret_cast<int32_t*>(hashes + c.n), places - 1};
  }
};
static_assert(sizeof(Entry) * kList >= sizeof(Word) + 4 * sizeof(int32_t), "the table fits");

template <typename Scalar>
struct LoadRow {
  Clusters c;
  const Scalar* input;  // (n, width)
  int64_t width;
  bool cosine;

  HIEXP_HD void operator()(int64_t i) const {
    double* row = c.centroid(i);
    double largest = 0.0;
    bool finite = true;
    for (int64_t k = 0; k < c.d; ++k) {
      // -0.0 + 0.0 = 0.0, so that equal rows have equal bits.
      row[k] = k < width ? to_double(input[i * width + k]) + 0.0 : 0.0;
      const double magnitude = fabs(row[k]);
      if (magnitude > largest) largest = magnitude;
      if (magnitude < HUGE_VAL) continue;
      finite = false;
      atomic_min(&c.counters->first_bad, static_cast<Word>(i * width + k));
    }
    if (cosine && finite) normalise(row, largest, static_cast<Word>(i));
    Table::of(c).hashes[i] = hash_row(row, c.d);
  }

  HIEXP_HD void normalise(double* row, double largest, Word i) const {
    if (largest == 0.0) return atomic_min(&c.counters->first_zero_row, i);
    double squares = 0.0;  // of the row over its largest entry: no overflow, no underflow
    for (int64_t k = 0; k < width; ++k) squares += (row[k] / largest) * (row[k] / largest);
    const double root = sqrt(squares);
    for (int64_t k = 0; k < width; ++k) row[k] = row[k] / largest / root;
  }
};

struct ClearTable {
  Clusters c;
  HIEXP_HD void operator()(int64_t i) const { Table::of(c).slots[i] = -1; }
};

HIEXP_HD inline bool equal_rows(const Clusters& c, const Table& table, int32_t i, int32_t j) {
  if (i == j) return true;
  if (table.hashes[i] != table.hashes[j]) return false;
  for (int k = 0; k < c.d; ++k) {
    if (bits_as<Word>(c.centroid(i)[k]) != bits_as<Word>(c.centroid(j)[k])) return false;
  }
  return true;
}

// Groups of equal rows take one place each, by linear probing; a place never changes its group.
struct EnterRow {
  Clusters c;
  HIEXP_HD void operator()(int64_t i) const {
    const Table table = Table::of(c);
    const auto row = static_cast<int32_t>(i);
    for (Word place = table.hashes[i] >> 7;; ++place) {
      int32_t* entry = table.slots + (place & table.mask);
      const int32_t before = atomic_replace(entry, -1, row);
      if (before < 0) return;
      if (equal_rows(c, table, before, row)) return atomic_min(entry, row);
    }
  }
};

// Afterwards `work` names the first row equal to each row, and `sizes` counts them there.
struct FindTwin {
  Clusters c;
  HIEXP_HD void operator()(int64_t i) const {
    const Table table = Table::of(c);
    const auto row = static_cast<int32_t>(i);
    for (Word place = table.hashes[i] >> 7;; ++place) {
      const int32_t entry = table.slots[place & table.mask];
      if (!equal_rows(c, table, entry, row)) continue;
      c.work[i] = entry;
      atomic_add(c.sizes + entry, 1.0);
      if (entry == row) atomic_add(&c.counters->alive, 1);
      return;
    }
  }
};

// Part p of the reductions over rows takes every kParts-th row, so that the order of additions is fixed.
struct ExtremesOfPart {
  Clusters c;
  HIEXP_HD void operator()(int64_t i) const {
    const int64_t part = i / c.d, k = i % c.d;
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (int64_t row = part; row < c.n; row += kParts) {
      const double value = c.centroid(row)[k];
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
    c.parts[i] = low;
    c.parts[static_cast<int64_t>(kParts) * c.d + i] = high;
  }
};

struct Extremes {
  Clusters c;
  HIEXP_HD void operator()(int64_t k) const {
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (int64_t part = 0; part < kParts; ++part) {
      const double smallest = c.parts[part * c.d + k], largest = c.parts[(kParts + part) * c.d + k];
      low = smallest < low ? smallest : low;
      high = largest > high ? largest : high;
    }
    c.low[k] = low;
    c.high[k] = high;
  }
};

// `low` holds the shift by now.
struct ShiftAndScale {
  Clusters c;
  double first, second;
  HIEXP_HD void operator()(int64_t i) const { c.centroids[i] = (c.centroids[i] - c.low[i % c.d]) * first * second; }
};

struct MeanOfPart {
  Clusters c;
  HIEXP_HD void operator()(int64_t i) const {
    const int64_t part = i / c.d, k = i % c.d;
    double sum = 0.0;
    for (int64_t row = part; row < c.n; row += kParts) sum += c.centroid(row)[k];
    c.parts[i] = sum;
  }
};

struct Mean {
  Clusters c;
  HIEXP_HD void operator()(int64_t k) const {
    double sum = 0.0;
    for (int64_t part = 0; part < kParts; ++part) sum += c.parts[part * c.d + k];
    c.centre[k] = sum / c.n;
  }
};

struct StartCluster {
  Clusters c;
  HIEXP_HD void operator()(int64_t i) const {
    c.forward[i] = static_cast<int32_t>(i);
    c.spreads[i] = 0.0;
    c.list_bounds[i] = 0.0;
    c.nearest_costs[i] = 0.0;
    c.nearest[i] = -1;
    c.counts[i] = 0;
    c.versions[i] = c.touched[i] = c.wanted[i] = 0;
    c.claims[i] = kNoKey;
    c.states[i] = c.sizes[i] > 0.0 ? State::open : State::empty;
  }
};

// Team: the lanes that share one item; rank, size, and sums and maxima over all of them.
HIEXP_ANY_SIDE
template <typename Team>
HIEXP_HD void encode_row(const Clusters& c, const Team& team, int64_t slot) {
  const double* row = c.centroid(slot);
  double largest = 0.0;
  for (int k = team.rank(); k < c.d; k += team.size()) {
    const double magnitude = fabs(row[k] - c.centre[k]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const int shift = shift_of(team.max(largest));
  const double up = ldexp(1.0, shift), down = ldexp(1.0, -shift);
  double squares = 0.0, rounded = 0.0, error = 0.0;
  for (int k = team.rank(); k < c.depth; k += team.size()) {
    const double value = k < c.d ? row[k] - c.centre[k] : 0.0;
    const uint16_t half = half_of(static_cast<float>(value * up));
    const double kept = static_cast<double>(float_of(half)) * down;
    c.halves[slot * c.depth + k] = half;
    squares += value * value;
    rounded += kept * kept;
    error += (value - kept) * (value - kept);
  }
  squares = team.sum(squares);
  rounded = team.sum(rounded);
  error = team.sum(error);
  if (team.rank() != 0) return;
  c.bounds[slot] = row_bound(squares, rounded, error, c.spreads[slot], c.sizes[slot], c.depth, shift);
}

// An empty slot is infinitely far from everything.
HIEXP_HD inline void remove_from_scans(const Clusters& c, int64_t slot) {
  c.bounds[slot].q = static_cast<float>(HUGE_VAL);
  c.bounds[slot].size = 1.0f;
}

struct EncodeRow {
  Clusters c;
  HIEXP_ANY_SIDE
  template <typename Team>
  HIEXP_HD void operator()(const Team& team, int64_t slot) const {
    encode_row(c, team, slot);
    if (team.rank() == 0 && c.sizes[slot] == 0.0) remove_from_scans(c, slot);
  }
};

}  // namespace hiexp::clustering::device
