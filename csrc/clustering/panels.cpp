// See panels.h.
//
// Work mapping: a task is a block of rows times a range of panels. The rows are packed once per task (L2), a panel of
// 16 columns stays in L1 while all tiles of 12 rows meet it; each tile of 12 x 16 dots ends in at most a few
// insertions.
//
// Error bound. With u = 2^-24, x = fl(x) + e, |e| <= u |x| and d fused or unfused steps,
//   |fl(<fl(x), fl(y)>) - <x, y>| <= (2u + u^2 + (d + 1) u (1 + u)^2 ...) |x||y|,   2 |x||y| <= |x|^2 + |y|^2,
// so shrinking |x|^2 of every row by the factor 1 - (d + 32) 1.01 u covers twice the error of the product and the
// roundings of q_x + q_y - 2 <x, y> and of the weight with it: the bound costs nothing inside the loop. kUnderflow
// covers subnormal products.
#include "clustering/panels.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <numeric>

#include "clustering/kernels.h"

namespace hiexp::clustering {

namespace {

constexpr double kUnit = 1.0 / (1 << 24);  // unit roundoff of float32
constexpr double kUnderflow = 1e-30;       // norms are at most 1, so this is far above d * 2^-140
constexpr size_t kRowBlockBytes = 192 * 1024;
constexpr float kNothing = std::numeric_limits<float>::infinity();

float* allocate(size_t count) {
  const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (memory == nullptr) throw std::bad_alloc();
  std::fill_n(memory, count, 0.0f);
  return memory;
}

bool before(const Candidate& left, const Candidate& right) {
  return left.bound < right.bound || (left.bound == right.bound && left.slot < right.slot);
}

// Keeps `list` the sorted `keep` smallest; the total order makes the result independent of the order of insertion.
void insert(Candidate* list, size_t keep, Candidate candidate) {
  if (!before(candidate, list[keep - 1])) return;
  size_t place = keep - 1;
  for (; place > 0 && before(candidate, list[place - 1]); --place) list[place] = list[place - 1];
  list[place] = candidate;
}

}  // namespace

struct Panels::Range {
  size_t row_begin, row_end, panel_begin, panel_end;
};

void Panels::Free::operator()(float* memory) const { std::free(memory); }

Panels::Panels(size_t slots, size_t d, bool weighted, std::vector<double> centre)
    : slots_(slots), d_(d), weighted_(weighted), centre_(std::move(centre)) {
  const size_t padded = (slots + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  values_.reset(allocate(padded * d));
  q_.assign(padded, kNothing);
  size_.assign(padded, 1.0f);
}

float* Panels::column(size_t slot) const {
  return values_.get() + slot / kPanelColumns * d_ * kPanelColumns + slot % kPanelColumns;
}

void Panels::set(size_t slot, const double* centroid, double spread, double size) {
  float* target = column(slot);
  double squares = 0.0;
  for (size_t k = 0; k < d_; ++k) {
    const double value = centroid[k] - centre_[k];
    squares += value * value;
    target[k * kPanelColumns] = static_cast<float>(value);
  }
  const double slack = (static_cast<double>(d_) + 32.0) * 1.01 * kUnit;
  q_[slot] = static_cast<float>((squares + spread) * (1.0 - slack) - kUnderflow);
  size_[slot] = static_cast<float>(size);
}

void Panels::remove(size_t slot) {
  q_[slot] = kNothing;
  size_[slot] = 1.0f;
}

void Panels::resize(size_t slots) {
  for (size_t slot = slots; slot < slots_; ++slot) remove(slot);
  slots_ = slots;
}

size_t Panels::rows_per_block() const {
  const size_t tile_bytes = d_ * sizeof(float) * kTileRows;
  return std::max<size_t>(1, std::min<size_t>(8, kRowBlockBytes / tile_bytes)) * kTileRows;
}

// Rows transposed in tiles (tiles, d, kTileRows), the last one filled up with zeros.
std::vector<float> Panels::pack(const int32_t* rows, size_t n_rows) const {
  const size_t tiles = (n_rows + kTileRows - 1) / kTileRows;
  std::vector<float> packed(tiles * d_ * kTileRows, 0.0f);
  for (size_t r = 0; r < n_rows; ++r) {
    const float* source = column(static_cast<size_t>(rows[r]));
    float* target = packed.data() + r / kTileRows * d_ * kTileRows + r % kTileRows;
    for (size_t k = 0; k < d_; ++k) target[k * kTileRows] = source[k * kPanelColumns];
  }
  return packed;
}

std::vector<Candidate> Panels::scan(const std::vector<int32_t>& rows, size_t keep, const int32_t* group,
                                    ThreadPool& pool) const {
  if (rows.empty()) return {};
  const size_t block = rows_per_block();
  const size_t panels = (slots_ + kPanelColumns - 1) / kPanelColumns;
  const size_t row_blocks = (rows.size() + block - 1) / block;
  const size_t wanted = 4 * static_cast<size_t>(pool.size());
  // Few rows: split the columns too, so that every thread has work; at least 64 panels a task, as waking a thread costs
  // too.
  const size_t splits =
      pool.size() == 1 ? 1 : std::max<size_t>(1, std::min((wanted + row_blocks - 1) / row_blocks, panels / 64));
  std::vector<Candidate> found(splits * rows.size() * keep, Candidate{kNothing, -1});
  pool.run(row_blocks * splits, [&](size_t task) {
    const size_t row = task / splits, split = task % splits;
    const Range range{row * block, std::min(rows.size(), (row + 1) * block), split * panels / splits,
                      (split + 1) * panels / splits};
    scan_block(range, rows, keep, group, found.data() + split * rows.size() * keep);
  });
  for (size_t other = rows.size() * keep; other < found.size(); ++other) {
    insert(found.data() + other / keep % rows.size() * keep, keep, found[other]);
  }
  found.resize(rows.size() * keep);
  return found;
}

void Panels::scan_block(const Range& range, const std::vector<int32_t>& rows, size_t keep, const int32_t* group,
                        Candidate* out) const {
  const std::vector<float> packed = pack(rows.data() + range.row_begin, range.row_end - range.row_begin);
  for (size_t panel = range.panel_begin; panel < range.panel_end; ++panel) {
    for (size_t first = range.row_begin; first < range.row_end; first += kTileRows) {
      scan_tile(packed.data() + (first - range.row_begin) * d_, panel, rows.data() + first,
                std::min(kTileRows, range.row_end - first), keep, group, out + first * keep);
    }
  }
}

void Panels::scan_tile(const float* tile, size_t panel, const int32_t* rows, size_t n_rows, size_t keep,
                       const int32_t* group, Candidate* out) const {
  static constexpr float kNoLimits[kPanelColumns] = {};
  alignas(64) float dots[kTileRows * kPanelColumns];
  alignas(64) float keys[kPanelColumns];
  dot_tile(tile, values_.get() + panel * d_ * kPanelColumns, d_, n_rows, dots);
  const size_t first = panel * kPanelColumns;
  for (size_t r = 0; r < n_rows; ++r) {
    const auto row = static_cast<size_t>(rows[r]);
    Candidate* list = out + r * keep;
    if (!key_row(dots + r * kPanelColumns, q_.data() + first, size_.data() + first, q_[row], size_[row], weighted_,
                 list[keep - 1].bound, kNoLimits, keys)) {
      continue;
    }
    for (size_t c = 0; c < kPanelColumns; ++c) {
      const size_t slot = first + c;
      if (keys[c] > list[keep - 1].bound || keys[c] == kNothing || slot == row) continue;
      if (group != nullptr && group[slot] == group[row]) continue;
      insert(list, keep, {keys[c], static_cast<int32_t>(slot)});
    }
  }
}

// Every thread collects candidates of all slots on its own; the lists are merged at the end, in any order.
struct Panels::Lane {
  size_t keep;
  std::vector<Candidate> found;  // (slots, keep)
  std::vector<float> limits;     // (slots, padded) the last bound of each list

  void offer(size_t row, size_t slot, float key) {
    Candidate* list = found.data() + row * keep;
    insert(list, keep, {key, static_cast<int32_t>(slot)});
    limits[row] = list[keep - 1].bound;
  }
};

std::vector<Candidate> Panels::scan_all(size_t keep, ThreadPool& pool, Monitor& monitor) const {
  const size_t block = rows_per_block(), blocks = (slots_ + block - 1) / block;
  const Lane empty{keep, std::vector<Candidate>(slots_ * keep, Candidate{kNothing, -1}),
                   std::vector<float>(q_.size(), kNothing)};
  std::vector<Lane> lanes(static_cast<size_t>(pool.size()), empty);
  monitor.begin("scan", slots_);
  pool.run_lanes(blocks, [&](size_t b, size_t lane) {
    scan_upper_block(b * block, block, lanes[lane]);
    monitor.advance(std::min(block, slots_ - b * block));
  });
  monitor.begin("merge", slots_ - 1);
  std::vector<Candidate>& found = lanes[0].found;
  pool.run_ranges(slots_, 1024, [&](size_t begin, size_t end) {
    for (size_t lane = 1; lane < lanes.size(); ++lane) {
      for (size_t other = begin * keep; other < end * keep; ++other) {
        insert(found.data() + other / keep * keep, keep, lanes[lane].found[other]);
      }
    }
  });
  return std::move(found);
}

// The products of a block of rows with themselves and everything after them.
void Panels::scan_upper_block(size_t first, size_t block, Lane& lane) const {
  const size_t last = std::min(slots_, first + block);
  std::vector<int32_t> rows(last - first);
  std::iota(rows.begin(), rows.end(), static_cast<int32_t>(first));
  const std::vector<float> packed = pack(rows.data(), rows.size());
  for (size_t panel = first / kPanelColumns; panel * kPanelColumns < slots_; ++panel) {
    for (size_t row = first; row < last; row += kTileRows) {
      scan_upper_tile(packed.data() + (row - first) * d_, panel, row, std::min(kTileRows, last - row), lane);
    }
  }
}

void Panels::scan_upper_tile(const float* tile, size_t panel, size_t first, size_t n_rows, Lane& lane) const {
  alignas(64) float dots[kTileRows * kPanelColumns];
  alignas(64) float keys[kPanelColumns];
  dot_tile(tile, values_.get() + panel * d_ * kPanelColumns, d_, n_rows, dots);
  const size_t column = panel * kPanelColumns;
  for (size_t row = first; row < first + n_rows; ++row) {
    if (!key_row(dots + (row - first) * kPanelColumns, q_.data() + column, size_.data() + column, q_[row], size_[row],
                 weighted_, lane.limits[row], lane.limits.data() + column, keys)) {
      continue;
    }
    for (size_t c = 0; c < kPanelColumns; ++c) {
      const size_t slot = column + c;
      if (slot <= row || keys[c] == kNothing) continue;
      if (keys[c] <= lane.limits[row]) lane.offer(row, slot, keys[c]);
      if (keys[c] <= lane.limits[slot]) lane.offer(slot, row, keys[c]);
    }
  }
}

}  // namespace hiexp::clustering
