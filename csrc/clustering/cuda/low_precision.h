// Half-precision copies of centroids, what rounding cost them, and the lower bound on a cost that follows.
//
// A row x (less the centre) is stored as x^ = 2^-s fl16(2^s x), s such that the largest coordinate falls into
// [2^14, 2^15): products and their sums stay in the normal range of float32. With e = |x - x^| measured in float64,
//   |<x_i, x_j> - <x^_i, x^_j>| <= e_i |x_j| + e_j (|x_i| + e_i),
// and a sum of d products in float32, in any order, on tensor cores that truncate, errs by at most
// kAccumulation (d + 16) 2^-24 |x^_i| |x^_j|: each of d + d/4 additions loses less than 2^-23 of a partial sum of
// magnitudes, which never exceeds |x^_i| |x^_j| (Cauchy-Schwarz); the constant doubles that. 2 |x^_i| |x^_j| <=
// |x^_i|^2 + |x^_j|^2 moves this share into the rows' own terms, so that it costs nothing per pair.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "clustering/host_device.h"

namespace hiexp::clustering::device {

constexpr double kUnit = 1.0 / (1 << 24);  // unit roundoff of float32
constexpr double kAccumulation = 4.0;
constexpr double kRoundings = 32.0 * 1.01 * kUnit;  // of the bound itself, evaluated in float32
constexpr double kUpwards = 1.0 + 1e-6;             // covers rounding a norm to float32
constexpr double kUnderflow = 1e-30;                // rows have norms of at most 2, so this is far above what is lost
constexpr int kTopExponent = 14;
constexpr int kLargestShift = 60;  // products of two scales stay normal float32 numbers

template <typename To, typename From>
HIEXP_HD inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same width");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Round to nearest, ties to even; |x| < 65520.
HIEXP_HD inline uint16_t half_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x38800000u) {  // below 2^-14: the unit is 2^-24, which is that of float32 in [0.5, 1)
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

HIEXP_HD inline float float_of(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = (half >> 10) & 31u,
                 fraction = half & 1023u;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent > 0) return bits_as<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float value = static_cast<float>(fraction) * (1.0f / (1 << 24));
  return sign != 0 ? -value : value;
}

// What the bound needs to know of a row; every value is rounded to the safe side.
struct RowBound {
  float q;       // |x|^2 + spread, less the row's share of all errors; infinity for no cluster at all
  float error;   // at least |x - x^|
  float length;  // at least |x|
  float scale;   // 2^-s
  float size;    // members
};

HIEXP_HD inline int shift_of(double largest) {
  if (!(largest > 0.0)) return 0;
  const int shift = kTopExponent - ilogb(largest);
  return shift < kLargestShift ? shift : kLargestShift;
}

// squares = |x|^2, rounded = |x^|^2, error = |x - x^|^2.
HIEXP_HD inline RowBound row_bound(double squares, double rounded, double error, double spread, double size, int d,
                                   int shift) {
  const double accumulation = kAccumulation * (d + 16.0) * kUnit;
  return {static_cast<float>((squares + spread) * (1.0 - kRoundings) - accumulation * rounded - kUnderflow),
          static_cast<float>(sqrt(error) * kUpwards + kUnderflow),
          static_cast<float>(sqrt(squares) * kUpwards + kUnderflow), static_cast<float>(ldexp(1.0, -shift)),
          static_cast<float>(size)};
}

// Lower bound on the cost between two clusters; `dot` is the product of the scaled half-precision rows.
HIEXP_HD inline float cost_bound(float dot, const RowBound& i, const RowBound& j, bool weighted) {
  const float product = dot * (i.scale * j.scale);
  const float error = i.error * j.length + j.error * (i.length + i.error);
  const float key = (i.q + j.q) - 2.0f * (product + error);
  const float positive = key > 0.0f ? key : 0.0f;
  return weighted ? positive * (2.0f * i.size * j.size / (i.size + j.size)) : positive;
}

}  // namespace hiexp::clustering::device
