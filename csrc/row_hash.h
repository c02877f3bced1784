// A hash of the bits of a row, to find equal rows; not stable across versions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace hiexp {

template <typename Scalar>
uint64_t hash_row(const Scalar* row, size_t d) {
  std::conditional_t<sizeof(Scalar) == 8, uint64_t, uint32_t> bits;
  static_assert(sizeof bits == sizeof(Scalar));
  uint64_t hash = 0x9e3779b97f4a7c15ULL;
  for (size_t k = 0; k < d; ++k) {
    std::memcpy(&bits, row + k, sizeof bits);
    hash = (hash ^ bits) * 0x94d049bb133111ebULL;
    hash ^= hash >> 29;
  }
  return hash;
}

}  // namespace hiexp
