// See exact_index.h.
#include "retrieval/exact_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "retrieval/kernels.h"

namespace hiexp::retrieval {

namespace {

uint64_t hash_row(const float* row, size_t d) {
  uint64_t hash = 0x9E3779B97F4A7C15ULL;
  for (size_t i = 0; i < d; ++i) {
    uint32_t word;
    std::memcpy(&word, row + i, sizeof word);
    hash = (hash ^ word) * 0xBF58476D1CE4E5B9ULL;
    hash ^= hash >> 29;
  }
  return hash;
}

}  // namespace

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
  slack_.assign(blocks, 0.0F);
  size_t begin = 0;
  for (const size_t end : layout_.ends) {
    codes_.emplace_back(blocks * (end - begin) * kBlock);
    tails_.emplace_back(blocks * kBlock);
    begin = end;
  }
}

size_t ExactIndex::n_blocks() const { return (points_.size() + kBlock - 1) / kBlock; }

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

void ExactIndex::store(size_t first, const float* rotated, size_t count) {
  std::vector<double> coded(d_);
  for (size_t i = 0; i < count; ++i) {
    const float* values = rotated + i * d_;
    const size_t point = first + i, block = point / kBlock, lane = point % kBlock;
    double error = 0.0, norm = 0.0;
    size_t begin = 0;
    for (size_t stage = 0; stage < codes_.size(); ++stage) {
      const size_t end = layout_.ends[stage];
      int8_t* codes = codes_[stage].data() + block * (end - begin) * kBlock + lane;
      for (size_t c = begin; c < end; ++c) {
        // A value beyond the range is clipped; its error counts like any other.
        const double scale = layout_.scales[c], steps = std::nearbyint(values[c] / scale);
        const double code = std::isfinite(steps) ? std::clamp(steps, -127.0, 127.0) : 0.0;
        codes[(c - begin) * kBlock] = static_cast<int8_t>(code);
        coded[c] = code * scale;
        error += (values[c] - coded[c]) * (values[c] - coded[c]);
        norm += static_cast<double>(values[c]) * values[c];
      }
      begin = end;
    }
    if (!std::isfinite(norm)) throw std::invalid_argument("vectors: expected finite values, got NaN or infinity");
    double rest = 0.0;
    for (size_t stage = codes_.size(), c = d_; stage-- > 0;) {
      for (; c > layout_.ends[stage]; --c) rest += coded[c - 1] * coded[c - 1];
      // A float rounded upwards: bounds must not fall below the truth.
      tails_[stage][point] = static_cast<float>(std::sqrt(rest) * (1.0 + 1e-6));
    }
    const double slack = (std::sqrt(error) + layout_.relative * (std::sqrt(norm) + std::sqrt(error))) * (1.0 + 1e-6);
    slack_[block] = std::max(slack_[block], static_cast<float>(slack));
  }
}

}  // namespace hiexp::retrieval
