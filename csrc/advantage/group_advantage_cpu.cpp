// The steps of phases.h in row order. Linear and bound by memory, far below a millisecond for 64k rollouts in the order
// they come in, so one thread.
#include "advantage/group_advantage_cpu.h"

#include <algorithm>
#include <memory>
#include <new>

#include "advantage/phases.h"

namespace hiexp::advantage {
namespace {

struct SerialSwap {
  int32_t operator()(int32_t* entry, int32_t row) const {
    const int32_t before = *entry;
    if (before < 0) *entry = row;
    return before;
  }
};

// False where the labels do not ascend; what was written until then is written again.
template <typename Real>
bool score_runs(const Batch<Real>& batch, const Options& options, const Result<Real>& result) {
  for (int64_t begin = 0; begin < batch.rows;) {
    if (descends(batch.labels, begin)) return false;
    const int64_t end = end_of_run(batch.labels, begin, batch.rows, batch.rows);
    score_run(batch, begin, end, options, result);
    begin = end;
  }
  return true;
}

// Numbers the groups in the order of their first rows, so that their accumulators lie side by side.
void number_groups(const Labels& labels, int64_t rows, const Workspace& workspace) {
  std::fill_n(workspace.table, workspace.capacity, -1);
  int32_t groups = 0;
  for (int64_t row = 0; row < rows; ++row) {
    // Rollouts of one group often lie side by side: then the table is asked once.
    const int64_t owner = starts_run(labels, row) ? claim(SerialSwap{}, labels, row, workspace) : row - 1;
    if (owner == row) workspace.groups[groups] = empty_accumulator();
    workspace.group_of[row] = owner == row ? groups++ : workspace.group_of[owner];
  }
}

// One pass over the rows, with the accumulator of a later row on its way from memory: scattered labels miss every
// cache.
template <typename Real, typename Pass>
void for_each_row(const Batch<Real>& batch, const Workspace& workspace, bool with_batch, const Pass& pass) {
  constexpr int64_t kAhead = 16;
  for (int64_t row = 0; row < batch.rows; ++row) {
    if (row + kAhead < batch.rows) __builtin_prefetch(&workspace.groups[workspace.group_of[row + kAhead]], 1);
    pass(&workspace.groups[workspace.group_of[row]], row);
    if (with_batch) pass(&workspace.groups[batch.rows], row);
  }
}

// The three passes over the groups; the same over the whole batch where its deviation is asked for.
template <typename Real>
double accumulate(const Batch<Real>& batch, const Options& options, const Workspace& workspace) {
  const SerialAdd add;
  const bool with_batch = options.scale == Scale::kBatch;
  workspace.groups[batch.rows] = empty_accumulator();
  for_each_row(batch, workspace, with_batch,
               [&](Accumulator* group, int64_t row) { add_extent(add, group, row, batch.rewards[row]); });
  for_each_row(batch, workspace, with_batch,
               [&](Accumulator* group, int64_t row) { add_position(add, group, batch.rewards[row]); });
  for_each_row(batch, workspace, with_batch,
               [&](Accumulator* group, int64_t row) { add_square(add, group, batch.rewards[row]); });
  return moments_of(workspace.groups[batch.rows], options.ddof).deviation;
}

template <typename Real>
void score_by_table(const Batch<Real>& batch, const Options& options, const Result<Real>& result) {
  constexpr std::align_val_t kLine{alignof(Accumulator)};
  const auto release = [](void* memory) { ::operator delete(memory, kLine); };
  const std::unique_ptr<void, decltype(release)> memory(::operator new(workspace_bytes(batch.rows, 0), kLine), release);
  const Workspace workspace = carve(memory.get(), batch.rows, 0);
  number_groups(batch.labels, batch.rows, workspace);
  const double batch_deviation = accumulate(batch, options, workspace);
  for_each_row(batch, workspace, false, [&](Accumulator*, int64_t row) {
    write_row_from_table(batch, row, workspace, batch_deviation, options, result);
  });
}

template <typename Real>
void spread_over_tokens(const Batch<Real>& batch, const Result<Real>& result) {
  for (int64_t row = 0; row < batch.rows; ++row) {
    const TokenRange range = tokens_of(batch.tokens, row);
    for (int64_t token = range.begin; token < range.end; ++token) {
      result.tokens[token] = batch.tokens.mask[token] ? result.advantages[row] : Real{0};
    }
  }
}

}  // namespace

template <typename Real>
void group_advantage(const Batch<Real>& batch, const Options& options, const Result<Real>& result) {
  int64_t unusable = kNone, offset = kNone;
  for (int64_t row = 0; row < batch.rows; ++row) {
    if (!is_usable(batch.rewards[row])) unusable = std::min(unusable, row);
    offset = std::min(offset, bad_offset(batch.tokens, row, batch.rows));
  }
  result.notes[0] = unusable == kNone ? -1 : unusable;
  result.notes[1] = offset == kNone ? -1 : offset;
  if (needs_table(options) || !score_runs(batch, options, result)) score_by_table(batch, options, result);
  if (batch.tokens.total > 0) spread_over_tokens(batch, result);
}

template void group_advantage<float>(const Batch<float>&, const Options&, const Result<float>&);
template void group_advantage<double>(const Batch<double>&, const Options&, const Result<double>&);

}  // namespace hiexp::advantage
