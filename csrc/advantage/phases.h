// The steps of a call, one row at a time: the CPU walks through the rows, the GPU gives a thread to each.
//
// Run path: labels ascend, as rollouts usually come. The thread of a group's first row does the whole group.
// Table path: anything else. Rows claim their label in a hash table, then add themselves to its accumulator in three
// passes (extent, sum, squares); sums are integers, so their order does not matter.
#pragma once

#include "advantage/batch.h"

namespace hiexp::advantage {

// The deviation of the whole batch needs all rows before any advantage: that is the table path's order of work.
HIEXP_HOST_DEVICE inline bool needs_table(const Options& options) { return options.scale == Scale::kBatch; }

HIEXP_HOST_DEVICE inline bool starts_run(const Labels& labels, int64_t row) {
  return row == 0 || labels[row] != labels[row - 1];
}
HIEXP_HOST_DEVICE inline bool descends(const Labels& labels, int64_t row) {
  return row > 0 && labels[row] < labels[row - 1];
}
// One past the run's last row; at most begin + limit + 1, which is then too long.
HIEXP_HOST_DEVICE inline int64_t end_of_run(const Labels& labels, int64_t begin, int64_t rows, int64_t limit) {
  const int64_t label = labels[begin], stop = rows - begin > limit ? begin + limit + 1 : rows;
  int64_t end = begin + 1;
  while (end < stop && labels[end] == label) ++end;
  return end;
}

template <typename Real>
HIEXP_HOST_DEVICE void write_row(const Batch<Real>& batch, int64_t row, const Moments& group, bool is_first,
                                 double batch_deviation, const Options& options, const Result<Real>& result) {
  const double reward = batch.rewards[row];
  const bool usable = is_usable(reward);
  result.advantages[row] = usable ? static_cast<Real>(advantage(reward, group, batch_deviation, options)) : Real{0};
  result.degenerate[row] = !usable || is_degenerate(group, options);
  result.count[row] = is_first ? static_cast<int32_t>(group.count) : -1;
  result.mean[row] = is_first ? static_cast<Real>(mean_of(group)) : Real{0};
  result.std[row] = is_first ? static_cast<Real>(group.deviation) : Real{0};
}

template <typename Real>
HIEXP_HOST_DEVICE void score_run(const Batch<Real>& batch, int64_t begin, int64_t end, const Options& options,
                                 const Result<Real>& result) {
  Accumulator group = empty_accumulator();
  const SerialAdd add;
  for (int64_t row = begin; row < end; ++row) add_extent(add, &group, row, batch.rewards[row]);
  if (group.least < group.greatest) {  // otherwise all sums are 0
    for (int64_t row = begin; row < end; ++row) add_position(add, &group, batch.rewards[row]);
    for (int64_t row = begin; row < end; ++row) add_square(add, &group, batch.rewards[row]);
  }
  const Moments moments = moments_of(group, options.ddof);
  for (int64_t row = begin; row < end; ++row) {
    write_row(batch, row, moments, row == begin, 0.0, options, result);
  }
}

// splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): every bit of a label reaches every bit of its slot.
HIEXP_HOST_DEVICE inline uint64_t mix(uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
  return bits ^ bits >> 31;
}

// The row that stands for this row's label. Which one wins depends on timing; no result does.
// `Swap`: compare-and-swap on a table entry from -1, returns what was there.
template <typename Swap>
HIEXP_HOST_DEVICE int32_t claim(const Swap& swap, const Labels& labels, int64_t row, const Workspace& workspace) {
  const int64_t label = labels[row];
  const auto last = static_cast<uint64_t>(workspace.capacity - 1);
  for (uint64_t slot = mix(static_cast<uint64_t>(label)) & last;; slot = (slot + 1) & last) {
    const int32_t owner = swap(workspace.table + slot, static_cast<int32_t>(row));
    if (owner < 0) return static_cast<int32_t>(row);
    if (labels[owner] == label) return owner;
  }
}

template <typename Real>
HIEXP_HOST_DEVICE void write_row_from_table(const Batch<Real>& batch, int64_t row, const Workspace& workspace,
                                            double batch_deviation, const Options& options,
                                            const Result<Real>& result) {
  const Accumulator& group = workspace.groups[workspace.group_of[row]];
  write_row(batch, row, moments_of(group, options.ddof), group.first == row, batch_deviation, options, result);
}

// First and last token of a rollout, kept inside the output whatever the offsets hold.
struct TokenRange {
  int64_t begin, end;
};
HIEXP_HOST_DEVICE inline TokenRange tokens_of(const Tokens& tokens, int64_t row) {
  if (tokens.offsets == nullptr) return {row * tokens.width, (row + 1) * tokens.width};
  const int64_t begin = tokens.offsets[row], end = tokens.offsets[row + 1];
  return {begin < 0 ? 0 : begin, end > tokens.total ? tokens.total : end};
}
// The first offset of this rollout that is wrong, kNone if both are right: they start at 0, never fall, end at total.
HIEXP_HOST_DEVICE inline int64_t bad_offset(const Tokens& tokens, int64_t row, int64_t rows) {
  if (tokens.offsets == nullptr) return kNone;
  const int64_t begin = tokens.offsets[row], end = tokens.offsets[row + 1];
  if (row == 0 && begin != 0) return 0;
  return end < begin || (row == rows - 1 && end != tokens.total) ? row + 1 : kNone;
}

}  // namespace hiexp::advantage
