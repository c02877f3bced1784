// See exact_index.h.
#include "retrieval/exact_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "row_hash.h"

namespace hiexp::retrieval {

ExactIndex::ExactIndex(const float* rows, size_t n, size_t d, std::vector<double> least, Layout layout)
    : rows_(rows), n_(n), d_(d), least_(std::move(least)), layout_(std::move(layout)) {
  find_points();
  const size_t blocks = n_blocks();
  block_least_.assign(blocks, std::numeric_limits<double>::infinity());
  for (size_t point = 0; point < points_.size(); ++point) {
    double& lowest = block_least_[point / kBlock];
    for (int64_t at = member_begin_[point]; at < member_begin_[point + 1]; ++at) {
      lowest = std::min(lowest, least_[static_cast<size_t>(members_[static_cast<size_t>(at)])]);
    }
  }
  block_norm_.assign(blocks, 0.0F);
  low_.assign(d_, std::numeric_limits<float>::infinity());
  high_.assign(d_, -std::numeric_limits<float>::infinity());
  size_t begin = 0;
  for (const size_t end : layout_.ends) {
    cells_.emplace_back(blocks * lines_of(layout_, end - begin));
    tails_.emplace_back(blocks * kBlock);
    begin = end;
  }
}

// Equal rows (bit by bit) become one point: lessons about one question share its title.
void ExactIndex::find_points() {
  size_t capacity = 16;
  while (capacity < 2 * n_) capacity *= 2;
  std::vector<int64_t> table(capacity, -1), point_of(n_);
  for (size_t row = 0; row < n_; ++row) {
    const float* values = rows_ + row * d_;
    size_t slot = hash_row(values, d_) & (capacity - 1);
    while (table[slot] >= 0 && std::memcmp(rows_ + points_[static_cast<size_t>(table[slot])] * static_cast<int64_t>(d_),
                                           values, d_ * sizeof(float)) != 0) {
      slot = (slot + 1) & (capacity - 1);
    }
    if (table[slot] < 0) {
      table[slot] = static_cast<int64_t>(points_.size());
      points_.push_back(static_cast<int64_t>(row));
    }
    point_of[row] = table[slot];
  }
  member_begin_.assign(points_.size() + 1, 0);
  for (const int64_t point : point_of) ++member_begin_[static_cast<size_t>(point) + 1];
  for (size_t point = 0; point < points_.size(); ++point) member_begin_[point + 1] += member_begin_[point];
  members_.resize(n_);
  std::vector<int64_t> next(member_begin_.begin(), member_begin_.end() - 1);
  for (size_t row = 0; row < n_; ++row) {
    members_[static_cast<size_t>(next[static_cast<size_t>(point_of[row])]++)] = static_cast<int64_t>(row);
  }
}

// Writes the cells of one point's columns of a stage into the lines of its block.
void ExactIndex::put(const uint8_t* cells, size_t width, Line* lines, size_t lane) const {
  const size_t group = lane / kGroup * ((width + 7) / 8);
  for (size_t c = 0; c < width; ++c) {
    const int shift = layout_.dense() ? static_cast<int>(c % 8 / 4 * 4) : line_shift(lane);
    uint8_t& byte =
        layout_.dense() ? lines[group + c / 8].bytes[lane % kGroup * 4 + c % 4] : lines[c].bytes[line_byte(lane)];
    byte |= static_cast<uint8_t>(cells[c] << shift);
  }
}

void ExactIndex::store(size_t first, const float* rotated, size_t count) {
  const size_t n_edges = layout_.edges.size() / d_;
  std::vector<uint8_t> cells(d_);
  for (size_t i = 0; i < count; ++i) {
    const float* values = rotated + i * d_;
    const size_t point = first + i, block = point / kBlock, lane = point % kBlock;
    find_cells(values, layout_.edges.data(), n_edges, d_, cells.data());
    for (size_t c = 0; c < d_; ++c) {
      low_[c] = std::min(low_[c], values[c]);
      high_[c] = std::max(high_[c], values[c]);
    }
    double error = 0.0, rest = 0.0;  // squares of the coding errors of columns read, and of the columns not read
    for (size_t c = 0; c < d_; ++c) rest += static_cast<double>(values[c]) * values[c];
    const double norm = std::sqrt(rest);
    if (!std::isfinite(rest)) throw std::invalid_argument("vectors: expected finite values, got NaN or infinity");
    block_norm_[block] = std::max(block_norm_[block], static_cast<float>(norm * (1.0 + 1e-6)));
    for (size_t stage = 0, begin = 0; stage < cells_.size(); begin = layout_.ends[stage++]) {
      const size_t end = layout_.ends[stage];
      put(cells.data() + begin, end - begin, cells_[stage].data() + block * lines_of(layout_, end - begin), lane);
      for (size_t c = begin; layout_.dense() && c < end; ++c) {
        const double off = values[c] - layout_.centre(cells[c], c, d_);
        error += off * off;
      }
      rest = 0.0;  // afresh: a difference of squares would lose digits
      for (size_t c = end; c < d_; ++c) rest += static_cast<double>(values[c]) * values[c];
      // A float rounded upwards: bounds must not fall below the truth.
      tails_[stage][point] = static_cast<float>(std::sqrt(kErrorWeight * error + rest) * (1.0 + 1e-6));
    }
  }
}

}  // namespace hiexp::retrieval
