// Whole rows of costs in float64, for the rows whose neighbours float32 cannot tell apart.
//
// Work mapping: a task is a few rows, which meet a column while it is in the cache, times a range of columns; columns
// are split where there are few rows, so that every thread has work, and where a task would last too long. Lists keep
// the best entries in a total order, so that the splits do not show.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "clustering/neighbour_list.h"
#include "clustering/thread_pool.h"

namespace hiexp::clustering {

// Sets lists[row] of every row to its best entries among n columns; entry_of(row, column) gives an exact entry, or one
// with slot = -1 for a column that does not count. d coordinates go into a cost.
template <typename EntryOf>
void scan_rows_exactly(const std::vector<int32_t>& rows, size_t n, size_t d, const std::vector<int32_t>& ids,
                       std::vector<NeighbourList>& lists, ThreadPool& pool, const EntryOf& entry_of) {
  constexpr size_t kRows = 8, kTaskCoordinates = size_t{1} << 26;
  const size_t groups = (rows.size() + kRows - 1) / kRows, threads = static_cast<size_t>(pool.size());
  const size_t columns = std::max<size_t>(1, std::min(n, kTaskCoordinates / (kRows * d)));
  const size_t splits = std::max((n + columns - 1) / columns, groups < threads ? threads : 1);
  std::vector<NeighbourList> found(rows.size() * splits, NeighbourList{{}, kInfinity});
  pool.run(groups * splits, [&](size_t task) {
    const size_t group = task / splits, split = task % splits;
    for (size_t column = split * n / splits; column < (split + 1) * n / splits; ++column) {
      for (size_t r = group * kRows; r < std::min(rows.size(), (group + 1) * kRows); ++r) {
        const auto row = static_cast<size_t>(rows[r]);
        const ListEntry entry = entry_of(row, column);
        if (entry.slot >= 0) found[r * splits + split].offer(entry, ids[row], ids);
      }
    }
  });
  for (size_t r = 0; r < rows.size(); ++r) {
    const auto row = static_cast<size_t>(rows[r]);
    lists[row] = {{}, kInfinity};
    for (size_t split = 0; split < splits; ++split) {
      const NeighbourList& part = found[r * splits + split];
      for (const ListEntry& entry : part.entries) lists[row].offer(entry, ids[row], ids);
      lists[row].bound = std::min(lists[row].bound, part.bound);
    }
  }
}

}  // namespace hiexp::clustering
