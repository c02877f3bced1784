// The arithmetic of group advantages, written once for the CPU and the CUDA kernel.
//
// Advantage of rollout i in group g (GRPO, arXiv:2402.03300, eq. 4, and its variants):
//   A_i = (r_i - b_i) / (s + eps)
// with b_i the group mean, the mean of the other members (RLOO) or 0, and s the standard deviation of the group, of the
// batch, or no division at all.
//
// The statistics are a pure function of the set of rewards: least and greatest reward, then sums in fixed point, which
// are integers and so do not depend on the order of additions. Atomics, any number of threads, any order of rows and
// both devices give the same bits. Fixed point is relative to the group's own range: rewards such as 1e6 + small lose
// no digits, and squares never overflow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define HIEXP_HOST_DEVICE __host__ __device__
#else
#define HIEXP_HOST_DEVICE
#endif

namespace hiexp::advantage {

enum class Baseline : int { kMean, kLeaveOneOut, kNone };
enum class Scale : int { kStd, kNone, kBatch };
enum class Singleton : int { kZero, kRaw };

struct Options {
  Baseline baseline;
  Scale scale;
  Singleton singleton;
  int ddof;    // 0 or 1: divisor of the variance is count - ddof
  double eps;  // added to the standard deviation, as every stack does
};

// Above it the difference of two rewards could overflow. False for NaN, too.
HIEXP_HOST_DEVICE inline bool is_usable(double reward) { return ::fabs(reward) <= 0x1p1022; }

// Integers in the order of the doubles, so that integer atomics find a minimum.
HIEXP_HOST_DEVICE inline int64_t flip(int64_t bits) { return bits < 0 ? bits ^ INT64_MAX : bits; }
HIEXP_HOST_DEVICE inline int64_t to_key(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return flip(bits);
}
HIEXP_HOST_DEVICE inline double from_key(int64_t key) {
  const int64_t bits = flip(key);
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HIEXP_HOST_DEVICE inline double power_of_two(int exponent) {  // -1022 <= exponent <= 1023
  const int64_t bits = static_cast<int64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A number in [0, 4] as 30 bits after the binary point and 33 below them: the sums of 2^31 of them fit into 63 bits.
struct Digits {
  int64_t high, low;
};
HIEXP_HOST_DEVICE inline Digits split(double value) {
  const double scaled = value * 0x1p30;
  const auto high = static_cast<int64_t>(scaled);
  return {high, static_cast<int64_t>((scaled - static_cast<double>(high)) * 0x1p33)};
}
HIEXP_HOST_DEVICE inline double join(Digits sum) {
  return (static_cast<double>(sum.high) + static_cast<double>(sum.low) * 0x1p-33) * 0x1p-30;
}

// What the rows of one group add up to; one cache line. `Add` below is the way to add: plain or atomic.
struct alignas(64) Accumulator {
  int64_t first;            // lowest row of the group
  int64_t count;            // its usable rewards
  int64_t least, greatest;  // keys of these
  Digits sum, squares;      // of positions, and of their distances from the mean
};

HIEXP_HOST_DEVICE inline Accumulator empty_accumulator() {
  return {INT64_MAX, 0, INT64_MAX, INT64_MIN, {0, 0}, {0, 0}};
}

// Positions on the group's own axis: (reward - least) / unit, in [0, 2). The unit is a power of two, so nothing rounds
// but the subtraction. Of subnormal ranges the unit is the smallest normal number.
struct Axis {
  double least, unit, inverse;
};
HIEXP_HOST_DEVICE inline Axis axis_of(const Accumulator& group) {
  if (group.count == 0) return {0.0, 1.0, 1.0};
  const double least = from_key(group.least), range = from_key(group.greatest) - least;
  if (range == 0.0) return {least, 1.0, 1.0};
  int64_t bits;
  memcpy(&bits, &range, sizeof bits);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  if (exponent < -1022) exponent = -1022;
  // 2^-1023 is subnormal: two exact steps.
  return {least, power_of_two(exponent), exponent < 1023 ? power_of_two(-exponent) : power_of_two(-1022) * 0.5};
}
HIEXP_HOST_DEVICE inline double position(const Axis& axis, double reward) {
  return (reward - axis.least) * axis.inverse;
}
HIEXP_HOST_DEVICE inline double mean_position(const Accumulator& group) {
  return group.count > 0 ? join(group.sum) / static_cast<double>(group.count) : 0.0;
}

// The three passes over a group's rewards. A reward that is not usable adds neutral values, so that the lanes of a warp
// stay together.
template <typename Add>
HIEXP_HOST_DEVICE void add_extent(const Add& add, Accumulator* group, int64_t row, double reward) {
  const bool usable = is_usable(reward);
  add.lower(&group->first, row);
  add.plus(&group->count, usable ? 1 : 0);
  add.lower(&group->least, usable ? to_key(reward) : INT64_MAX);
  add.raise(&group->greatest, usable ? to_key(reward) : INT64_MIN);
}
template <typename Add>
HIEXP_HOST_DEVICE void add_position(const Add& add, Accumulator* group, double reward) {
  const Digits digits = is_usable(reward) ? split(position(axis_of(*group), reward)) : Digits{0, 0};
  add.plus(&group->sum.high, digits.high);
  add.plus(&group->sum.low, digits.low);
}
template <typename Add>
HIEXP_HOST_DEVICE void add_square(const Add& add, Accumulator* group, double reward) {
  const double distance = is_usable(reward) ? position(axis_of(*group), reward) - mean_position(*group) : 0.0;
  const Digits digits = split(distance * distance);
  add.plus(&group->squares.high, digits.high);
  add.plus(&group->squares.low, digits.low);
}

// Additions by a single thread.
struct SerialAdd {
  HIEXP_HOST_DEVICE void plus(int64_t* to, int64_t value) const { *to += value; }
  HIEXP_HOST_DEVICE void lower(int64_t* to, int64_t value) const { *to = value < *to ? value : *to; }
  HIEXP_HOST_DEVICE void raise(int64_t* to, int64_t value) const { *to = value > *to ? value : *to; }
};

// What a group's rows need to know of it after the three passes.
struct Moments {
  int64_t count;
  Axis axis;
  double shift;      // mean position
  double deviation;  // standard deviation, 0 where the group is too small for ddof
  bool all_equal;
};
HIEXP_HOST_DEVICE inline Moments moments_of(const Accumulator& group, int ddof) {
  const Axis axis = axis_of(group);
  const int64_t freedom = group.count - ddof;
  const bool all_equal = group.count == 0 || from_key(group.least) == from_key(group.greatest);
  const double variance = freedom > 0 ? join(group.squares) / static_cast<double>(freedom) : 0.0;
  return {group.count, axis, mean_position(group), all_equal ? 0.0 : ::sqrt(variance) * axis.unit, all_equal};
}
HIEXP_HOST_DEVICE inline double mean_of(const Moments& group) {
  return group.axis.least + group.shift * group.axis.unit;
}

// A row without a learning signal: a group whose rewards are all equal, or a singleton, unless singletons keep their
// raw reward.
HIEXP_HOST_DEVICE inline bool is_degenerate(const Moments& group, const Options& options) {
  if (group.count == 1) return options.singleton == Singleton::kZero;
  return group.all_equal;
}

HIEXP_HOST_DEVICE inline double advantage(double reward, const Moments& group, double batch_deviation,
                                          const Options& options) {
  if (group.count == 1) return options.singleton == Singleton::kRaw ? reward : 0.0;
  double centred =
      options.baseline == Baseline::kNone ? reward : (position(group.axis, reward) - group.shift) * group.axis.unit;
  // r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
  if (options.baseline == Baseline::kLeaveOneOut) {
    centred *= static_cast<double>(group.count) / static_cast<double>(group.count - 1);
  }
  if (options.scale == Scale::kNone) return centred;
  const double deviation = options.scale == Scale::kBatch ? batch_deviation : group.deviation;
  // Nothing to normalise by: r / eps would be a huge number without meaning (baseline "none"), or 0 / 0 (eps 0).
  return deviation == 0.0 ? 0.0 : centred / (deviation + options.eps);
}

}  // namespace hiexp::advantage
