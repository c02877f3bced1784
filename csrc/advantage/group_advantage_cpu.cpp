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

// The three passes over the groups; the same over the whole batch where its deviation is asked for.
template <typename Real>
double fill_table(const Batch<Real>& batch, const Options& options, const Workspace& workspace) {
  const SerialAdd add;
  std::fill_n(workspace.table, workspace.capacity, -1);
  Accumulator& whole = workspace.groups[batch.rows] = empty_accumulator();
  const bool with_batch = options.scale == Scale::kBatch;
  for (int64_t row = 0; row < batch.rows; ++row) {
    // Rollouts of one group often lie side by side: then the table is asked once.
    workspace.claimed[row] =
        starts_run(batch.labels, row) ? claim(SerialSwap{}, batch.labels, row, workspace) : workspace.claimed[row - 1];
    add_extent(add, &workspace.groups[workspace.claimed[row]], row, batch.rewards[row]);
    if (with_batch) add_extent(add, &whole, row, batch.rewards[row]);
  }
  for (int64_t row = 0; row < batch.rows; ++row) {
    add_position(add, &workspace.groups[workspace.claimed[row]], batch.rewards[row]);
    if (with_batch) add_position(add, &whole, batch.rewards[row]);
  }
  for (int64_t row = 0; row < batch.rows; ++row) {
    add_square(add, &workspace.groups[workspace.claimed[row]], batch.rewards[row]);
    if (with_batch) add_square(add, &whole, batch.rewards[row]);
  }
  return moments_of(whole, options.ddof).deviation;
}

template <typename Real>
void score_by_table(const Batch<Real>& batch, const Options& options, const Result<Real>& result) {
  constexpr std::align_val_t kLine{alignof(Accumulator)};
  const auto release = [](void* memory) { ::operator delete(memory, kLine); };
  const std::unique_ptr<void, decltype(release)> memory(::operator new(workspace_bytes(batch.rows, 0), kLine), release);
  const Workspace workspace = carve(memory.get(), batch.rows, 0);
  const double batch_deviation = fill_table(batch, options, workspace);
  for (int64_t row = 0; row < batch.rows; ++row) {
    write_row_from_table(batch, row, workspace, batch_deviation, options, result);
  }
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
