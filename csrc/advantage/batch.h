// What one call reads and writes: plain pointers, on the CPU or on a device. Python has checked shapes and dtypes and
// allocated the outputs; contents (labels, offsets, mask) may be anything.
#pragma once

#include <cstdint>

#include "advantage/formula.h"

namespace hiexp::advantage {

enum class LabelType : int { kInt8, kInt16, kInt32, kInt64, kUint8, kUint16, kUint32 };

// (rows) group labels of any integer type, read as they come: no copy, no second launch.
struct Labels {
  const void* data;
  LabelType type;

  HIEXP_HOST_DEVICE int64_t operator[](int64_t row) const {
    switch (type) {
      case LabelType::kInt8:
        return static_cast<const int8_t*>(data)[row];
      case LabelType::kInt16:
        return static_cast<const int16_t*>(data)[row];
      case LabelType::kInt32:
        return static_cast<const int32_t*>(data)[row];
      case LabelType::kUint8:
        return static_cast<const uint8_t*>(data)[row];
      case LabelType::kUint16:
        return static_cast<const uint16_t*>(data)[row];
      case LabelType::kUint32:
        return static_cast<const uint32_t*>(data)[row];
      default:
        return static_cast<const int64_t*>(data)[row];
    }
  }
};

// Nonzero entries of an integer, bool or floating point array.
struct Mask {
  const void* data;    // null: every token counts
  int64_t entry_size;  // 1, 2, 4 or 8 bytes
  bool floating;       // then the sign bit does not count: -0.0 is zero

  HIEXP_HOST_DEVICE bool operator[](int64_t token) const {
    if (data == nullptr) return true;
    const int drop = floating ? 1 : 0;
    switch (entry_size) {
      case 1:
        return static_cast<const uint8_t*>(data)[token] << drop & 0xff;
      case 2:
        return static_cast<const uint16_t*>(data)[token] << drop & 0xffff;
      case 4:
        return static_cast<const uint32_t*>(data)[token] << drop != 0;
      default:
        return static_cast<const uint64_t*>(data)[token] << drop != 0;
    }
  }
};

// Tokens of rollout i: [offsets[i], offsets[i + 1]), or [i * width, (i + 1) * width) where there are no offsets.
struct Tokens {
  const int64_t* offsets;
  int64_t width;
  int64_t total;  // 0: no token output
  Mask mask;
};

template <typename Real>
struct Batch {
  const Real* rewards;  // (rows)
  Labels labels;        // (rows)
  int64_t rows;         // 1 .. 2^31 - 1
  Tokens tokens;
};

// Statistics of a group stand at its first row; all other rows have count -1 and zeros there.
template <typename Real>
struct Result {
  Real* advantages;  // (rows)
  bool* degenerate;  // (rows)
  Real* mean;        // (rows)
  Real* std;         // (rows)
  int32_t* count;    // (rows)
  Real* tokens;      // (tokens.total)
  int64_t* notes;    // (2): first row with an unusable reward, first bad offset; -1: none
};

constexpr int64_t kNone = INT64_MAX;  // no such row, in the notes of threads and blocks

// Scratch memory of the table path, carved out of one allocation.
struct Workspace {
  Accumulator* groups;   // (rows + 1): one a group, the last one of the whole batch
  int64_t* block_notes;  // (blocks, 3)
  int32_t* table;        // (capacity): open addressing, the row that claimed a label, -1 empty
  int32_t* group_of;     // (rows): index of the row's group in `groups`
  int64_t capacity;      // a power of two, at least twice the rows
};

HIEXP_HOST_DEVICE inline int64_t table_capacity(int64_t rows) {
  int64_t capacity = 64;
  while (capacity < 2 * rows) capacity *= 2;
  return capacity;
}
inline int64_t workspace_bytes(int64_t rows, int64_t blocks) {
  return (rows + 1) * static_cast<int64_t>(sizeof(Accumulator)) + blocks * 3 * 8 + (table_capacity(rows) + rows) * 4;
}
// `memory` is aligned to 64 bytes.
inline Workspace carve(void* memory, int64_t rows, int64_t blocks) {
  auto* groups = static_cast<Accumulator*>(memory);
  auto* block_notes = reinterpret_cast<int64_t*>(groups + rows + 1);
  auto* table = reinterpret_cast<int32_t*>(block_notes + blocks * 3);
  const int64_t capacity = table_capacity(rows);
  return {groups, block_notes, table, table + capacity, capacity};
}

}  // namespace hiexp::advantage
