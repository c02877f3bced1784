// See panels.h.
//
// Work mapping: a task is a block of rows times a range of panels, short enough to be interrupted. The rows are packed
// once per task; both they and a panel of 48 columns stay in L2 while all tiles of 8 rows meet it. A tile of 8 x 48
// dots ends in marks for the few pairs that may enter a list.
//
// Error bound. With u = 2^-24, x = fl(x) + e, |e| <= u |x| and d fused or unfused steps,
//   |fl(<fl(x), fl(y)>) - <x, y>| <= (2u + u^2 + (d + 1) u (1 + u)^2 ...) |x||y|,   2 |x||y| <= |x|^2 + |y|^2,
// so shrinking |x|^2 of every row by the factor 1 - (d + 32) 1.01 u covers twice the error of the product and the
// roundings of q_x + q_y - 2 <x, y> and of the weight with it: the bound costs nothing inside the loop. kUnderflow
// covers subnormal products.
#include "clustering/panels.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

#include "clustering/kernels.h"

namespace hiexp::clustering {

namespace {

constexpr double kUnit = 1.0 / (1 << 24);  // unit roundoff of float32
constexpr double kUnderflow = 1e-30;       // norms are at most 1, so this is far above d * 2^-140
constexpr size_t kRowBlockBytes = 320 * 1024;
constexpr size_t kMaxTiles = 4 * kPanelColumns / kTileRows;
constexpr double kTaskProducts = 2e9;  // multiplications of a task: 30 ms to 0.2 s
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

// For columns that collect nothing.
constexpr std::array<float, kPanelColumns> no_limits() {
  std::array<float, kPanelColumns> limits{};
  for (size_t c = 0; c < kPanelColumns; ++c) limits[c] = -1.0f;
  return limits;
}

// Keeps `list` the sorted `keep` smallest; the total order makes the result independent of the order of insertion.
void insert(Candidate* list, size_t keep, Candidate candidate) {
  if (!before(candidate, list[keep - 1])) return;
  size_t place = keep - 1;
  for (; place > 0 && before(candidate, list[place - 1]); --place) list[place] = list[place - 1];
  list[place] = candidate;
}

}  // namespace

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
  return std::max<size_t>(1, std::min<size_t>(kMaxTiles, kRowBlockBytes / tile_bytes)) * kTileRows;
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
  // Few rows: split the columns too, so that every thread has work; at least 24 panels a task, as waking a thread costs
  // too.
  const size_t for_threads =
      pool.size() == 1 ? 1 : std::max<size_t>(1, std::min((wanted + row_blocks - 1) / row_blocks, panels / 24));
  const size_t splits = std::max(for_threads, (panels + panels_per_task() - 1) / panels_per_task());
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

// The sums of a block fill this and are marked in place.
struct Panels::Tile {
  alignas(64) float values[kTileRows * kPanelColumns];
  alignas(64) uint8_t hits[kTileRows * kPanelColumns];

  // Calls body(r, c, t) for every mark of the first rows.
  template <typename Body>
  void for_hits(size_t n_rows, const Body& body) const {
    for (size_t r = 0; r < n_rows; ++r) {
      for (size_t c = 0; c < kPanelColumns; c += 8) {
        uint64_t eight;
        std::memcpy(&eight, hits + r * kPanelColumns + c, sizeof eight);
        if (eight == 0) continue;
        for (size_t i = c; i < c + 8; ++i) {
          if (hits[r * kPanelColumns + i] != 0) body(r, i, values[r * kPanelColumns + i]);
        }
      }
    }
  }
};

float Panels::key(float t, float size_row, float size_column) const {
  const float bound = t > 0.0f ? t : 0.0f;
  return plain() ? bound : bound * (2.0f * size_row * size_column / (size_row + size_column));
}

void Panels::scan_tile(const float* packed, size_t panel, const int32_t* rows, size_t n_rows, size_t keep,
                       const int32_t* group, Candidate* out) const {
  static constexpr auto kNoLimits = no_limits();
  float q[kTileRows], size[kTileRows], limit[kTileRows];
  for (size_t r = 0; r < n_rows; ++r) {
    q[r] = q_[static_cast<size_t>(rows[r])];
    size[r] = size_[static_cast<size_t>(rows[r])];
    limit[r] = out[r * keep + keep - 1].bound;
  }
  Tile tile;
  dot_tile(packed, values_.get() + panel * d_ * kPanelColumns, d_, n_rows, tile.values);
  const size_t first = panel * kPanelColumns;
  const TileSide columns{q_.data() + first, size_.data() + first, kNoLimits.data()};
  if (!mark_tile({q, size, limit}, n_rows, columns, !plain(), tile.values, tile.hits)) return;
  tile.for_hits(n_rows, [&](size_t r, size_t c, float t) {
    const size_t slot = first + c, row = static_cast<size_t>(rows[r]);
    if (q_[slot] == kNothing || slot == row || (group != nullptr && group[slot] == group[row])) return;
    insert(out + r * keep, keep, {key(t, size[r], size_[slot]), static_cast<int32_t>(slot)});
  });
}

// Every thread collects candidates of all slots on its own; the lists are merged at the end, in any order.
struct Panels::Lane {
  size_t keep;
  std::vector<Candidate> found;  // (slots, keep)
  std::vector<float> limits;     // (slots, padded) the last bound of each list

  void offer(size_t row, size_t slot, float key) {
    if (key > limits[row]) return;
    Candidate* list = found.data() + row * keep;
    insert(list, keep, {key, static_cast<int32_t>(slot)});
    limits[row] = list[keep - 1].bound;
  }
};

std::vector<Candidate> Panels::scan_all(size_t keep, const int32_t* group, ThreadPool& pool, Monitor& monitor) const {
  const std::vector<Range> tasks = upper_tasks();
  std::vector<Lane> lanes(static_cast<size_t>(pool.size()));
  for (Lane& lane : lanes) {
    lane = {keep, std::vector<Candidate>(slots_ * keep, Candidate{kNothing, -1}), std::vector<float>(q_.size(), -1.0f)};
    for (size_t slot = 0; slot < slots_; ++slot) lane.limits[slot] = q_[slot] == kNothing ? -1.0f : kNothing;
  }
  const size_t panels = (slots_ + kPanelColumns - 1) / kPanelColumns;
  pool.run_lanes(tasks.size(), [&](size_t task, size_t lane) {
    scan_upper_block(tasks[task], group, lanes[lane]);
    if (tasks[task].panel_end == panels) monitor.advance(tasks[task].row_end - tasks[task].row_begin);
  });
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

size_t Panels::panels_per_task() const {
  const double panel_products = static_cast<double>(rows_per_block() * kPanelColumns * d_);
  return std::max<size_t>(1, static_cast<size_t>(kTaskProducts / panel_products));
}

// Blocks of rows with themselves and everything after them.
std::vector<Panels::Range> Panels::upper_tasks() const {
  const size_t block = rows_per_block(), panels = (slots_ + kPanelColumns - 1) / kPanelColumns;
  std::vector<Range> tasks;
  for (size_t row = 0; row < slots_; row += block) {
    for (size_t panel = row / kPanelColumns; panel < panels; panel += panels_per_task()) {
      tasks.push_back({row, std::min(slots_, row + block), panel, std::min(panels, panel + panels_per_task())});
    }
  }
  return tasks;
}

void Panels::scan_upper_block(const Range& range, const int32_t* group, Lane& lane) const {
  std::vector<int32_t> rows(range.row_end - range.row_begin);
  std::iota(rows.begin(), rows.end(), static_cast<int32_t>(range.row_begin));
  const std::vector<float> packed = pack(rows.data(), rows.size());
  for (size_t panel = range.panel_begin; panel < range.panel_end; ++panel) {
    for (size_t row = range.row_begin; row < range.row_end; row += kTileRows) {
      const size_t n_rows = std::min(kTileRows, range.row_end - row);
      scan_upper_tile(packed.data() + (row - range.row_begin) * d_, panel, row, n_rows, group, lane);
    }
  }
}

void Panels::scan_upper_tile(const float* packed, size_t panel, size_t first, size_t n_rows, const int32_t* group,
                             Lane& lane) const {
  const size_t column = panel * kPanelColumns;
  if (column + kPanelColumns <= first) return;
  Tile tile;
  dot_tile(packed, values_.get() + panel * d_ * kPanelColumns, d_, n_rows, tile.values);
  const TileSide rows{q_.data() + first, size_.data() + first, lane.limits.data() + first};
  const TileSide columns{q_.data() + column, size_.data() + column, lane.limits.data() + column};
  if (!mark_tile(rows, n_rows, columns, !plain(), tile.values, tile.hits)) return;
  tile.for_hits(n_rows, [&](size_t r, size_t c, float t) {
    const size_t row = first + r, slot = column + c;
    if (slot <= row || q_[slot] == kNothing || q_[row] == kNothing) return;
    if (group != nullptr && group[slot] == group[row]) return;
    const float bound = key(t, size_[row], size_[slot]);
    lane.offer(row, slot, bound);
    lane.offer(slot, row, bound);
  });
}

}  // namespace hiexp::clustering
