// One search of an ExactIndex: bounds from the first stage for all blocks, the most promising blocks to their end, then
// whatever can still reach what they brought.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "clustering/thread_pool.h"
#include "retrieval/exact_index.h"
#include "retrieval/kernels.h"

namespace hiexp::retrieval {

namespace {

constexpr size_t kFirstBlocks = 32;  // finished before the others: their best rows are, as a rule, the best of all
constexpr size_t kFew = 2;           // points a block may have left to be scored at once, without another stage
constexpr size_t kBlocksPerTask = 64;
constexpr double kDecimals = 1e6;   // scores are rounded to six
constexpr double kRounding = 1e-6;  // more than rounding can lift a score

}  // namespace

class ExactIndex::Search {
 public:
  Search(const ExactIndex& index, const float* query, size_t top_k, std::optional<double> threshold,
         const std::vector<int64_t>& hidden);
  std::vector<Found> run(int n_threads);

 private:
  // What one thread has found: a heap whose front is the worst.
  using Best = std::vector<Found>;

  void first_stage(size_t block);
  void finish(size_t block, Best& best) const;
  void score(size_t point, Best& best) const;
  double least(size_t row) const { return threshold_ ? *threshold_ : index_.least_[row]; }
  float floor(size_t block, const Best& best) const;

  const ExactIndex& index_;
  size_t top_k_;
  std::optional<double> threshold_;
  const std::vector<int64_t>& hidden_;
  std::vector<double> query_;
  std::vector<float> weights_, tail_;  // per column read; per stage the norm of the query's columns not read
  std::vector<int32_t> columns_;       // within their stage
  std::vector<size_t> stage_begin_;    // of columns_
  float norm_ = 0.0F;
  double reached_ = -std::numeric_limits<double>::infinity();  // by the top_k-th after the first blocks
  float* sums_ = nullptr;                                      // (blocks, kBlock) after the first stage
  std::vector<float> bound_;                                   // (blocks,) the largest of a block
};

ExactIndex::Search::Search(const ExactIndex& index, const float* query, size_t top_k, std::optional<double> threshold,
                           const std::vector<int64_t>& hidden)
    : index_(index),
      top_k_(std::min(top_k, index.n_)),
      threshold_(threshold),
      hidden_(hidden),
      query_(query, query + index.d_) {
  const size_t d = index.d_;
  const Layout& layout = index.layout_;
  std::vector<float> turned(query, query + d);
  if (!layout.rotation.empty()) {
    std::fill(turned.begin(), turned.end(), 0.0F);
    for (size_t i = 0; i < d; ++i) {
      const float* row = layout.rotation.data() + i * d;
      for (size_t c = 0; c < d; ++c) turned[c] += query[i] * row[c];
    }
  }
  size_t begin = 0;
  stage_begin_.push_back(0);
  for (const size_t end : layout.ends) {
    for (size_t c = begin; c < end; ++c) {
      if (turned[c] == 0.0F) continue;
      columns_.push_back(static_cast<int32_t>(c - begin));
      weights_.push_back(turned[c] * layout.scales[c]);
    }
    stage_begin_.push_back(columns_.size());
    double rest = 0.0;
    for (size_t c = end; c < d; ++c) rest += static_cast<double>(turned[c]) * turned[c];
    tail_.push_back(static_cast<float>(std::sqrt(rest) * (1.0 + 1e-6)));
    begin = end;
  }
  const double squares = std::inner_product(query_.begin(), query_.end(), query_.begin(), 0.0);
  // The rotation may lengthen by layout.relative, which is far below one part in a hundred.
  norm_ = static_cast<float>(std::sqrt(squares) * 1.01);
}

// The score below which no row of the block can be returned, less what rounding can add.
float ExactIndex::Search::floor(size_t block, const Best& best) const {
  double lowest = std::max(threshold_ ? *threshold_ : index_.block_least_[block], reached_);
  if (best.size() == top_k_) lowest = std::max(lowest, best.front().score);
  const double reach = lowest - kRounding - 1e-6 * std::abs(lowest);
  return std::nextafter(static_cast<float>(reach), -std::numeric_limits<float>::infinity());
}

void ExactIndex::Search::first_stage(size_t block) {
  float* sum = sums_ + block * kBlock;
  float bounds[kBlock];
  std::fill_n(sum, kBlock, 0.0F);
  const size_t width = index_.layout_.ends[0];
  add_columns(index_.codes_[0].data() + block * width * kBlock, columns_.data(), weights_.data(), stage_begin_[1], sum);
  bound_[block] =
      upper_bounds(sum, index_.tails_[0].data() + block * kBlock, tail_[0], norm_ * index_.slack_[block], bounds);
}

void ExactIndex::Search::finish(size_t block, Best& best) const {
  const size_t begin = block * kBlock, count = std::min(kBlock, index_.points_.size() - begin);
  const size_t stages = index_.layout_.ends.size();
  if (stages == 0) {
    for (size_t lane = 0; lane < count; ++lane) score(begin + lane, best);
    return;
  }
  if (bound_[block] < floor(block, best)) return;
  alignas(64) float sum[kBlock], bounds[kBlock];
  std::copy_n(sums_ + begin, kBlock, sum);
  for (size_t stage = 0;; ++stage) {
    if (stage > 0) {
      const size_t width = index_.layout_.ends[stage] - index_.layout_.ends[stage - 1], from = stage_begin_[stage];
      add_columns(index_.codes_[stage].data() + block * width * kBlock, columns_.data() + from, weights_.data() + from,
                  stage_begin_[stage + 1] - from, sum);
    }
    const float lowest = floor(block, best);
    const float top =
        upper_bounds(sum, index_.tails_[stage].data() + begin, tail_[stage], norm_ * index_.slack_[block], bounds);
    if (top < lowest) return;
    size_t left = 0;
    for (size_t lane = 0; lane < count; ++lane) left += !(bounds[lane] < lowest);
    if (left > kFew && stage + 1 < stages) continue;
    // The most promising one first: what it brings may spare the others.
    const size_t leader = static_cast<size_t>(std::max_element(bounds, bounds + count) - bounds);
    score(begin + leader, best);
    for (size_t lane = 0; lane < count; ++lane) {
      if (lane != leader && !(bounds[lane] < floor(block, best))) score(begin + lane, best);
    }
    return;
  }
}

void ExactIndex::Search::score(size_t point, Best& best) const {
  const double product =
      exact_dot(index_.rows_ + static_cast<size_t>(index_.points_[point]) * index_.d_, query_.data(), index_.d_);
  const double rounded = std::nearbyint(product * kDecimals) / kDecimals;
  for (int64_t at = index_.member_begin_[point]; at < index_.member_begin_[point + 1]; ++at) {
    const Found found{rounded, index_.members_[static_cast<size_t>(at)]};
    const bool full = best.size() == top_k_;
    if (full && !(found < best.front())) return;  // the rows that follow are worse
    if (rounded < least(static_cast<size_t>(found.row))) continue;
    if (std::binary_search(hidden_.begin(), hidden_.end(), found.row)) continue;
    if (full) {
      std::pop_heap(best.begin(), best.end());
      best.pop_back();
    }
    best.push_back(found);
    std::push_heap(best.begin(), best.end());
  }
}

std::vector<Found> ExactIndex::Search::run(int n_threads) {
  const size_t blocks = index_.n_blocks();
  static thread_local std::vector<float> sums;  // kept: fresh pages cost more than the stage itself
  clustering::ThreadPool pool(
      static_cast<int>(std::clamp<size_t>(blocks / kBlocksPerTask, 1, static_cast<size_t>(n_threads))));
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (!index_.layout_.ends.empty()) {
    if (sums.size() < blocks * kBlock) sums.resize(blocks * kBlock);
    sums_ = sums.data();
    bound_.resize(blocks);
    pool.run_ranges(blocks, kBlocksPerTask, [&](size_t begin, size_t end) {
      for (size_t block = begin; block < end; ++block) first_stage(block);
    });
    const auto first_end = order.begin() + static_cast<ptrdiff_t>(std::min(blocks, kFirstBlocks));
    std::partial_sort(order.begin(), first_end, order.end(), [&](size_t a, size_t b) { return bound_[a] > bound_[b]; });
    std::sort(first_end, order.end());
  }
  std::vector<Best> found(static_cast<size_t>(pool.size()));
  const size_t first = std::min(blocks, kFirstBlocks);
  for (size_t i = 0; i < first; ++i) finish(order[i], found[0]);
  if (found[0].size() == top_k_) reached_ = found[0].front().score;
  const size_t tasks = (blocks - first + kBlocksPerTask - 1) / kBlocksPerTask;
  pool.run_lanes(tasks, [&](size_t task, size_t lane) {
    const size_t begin = first + task * kBlocksPerTask, end = std::min(blocks, begin + kBlocksPerTask);
    for (size_t i = begin; i < end; ++i) finish(order[i], found[lane]);
  });
  Best all;
  for (const Best& best : found) all.insert(all.end(), best.begin(), best.end());
  std::sort(all.begin(), all.end());
  if (all.size() > top_k_) all.resize(top_k_);
  return all;
}

std::vector<Found> ExactIndex::search(const float* query, size_t top_k, std::optional<double> threshold,
                                      const std::vector<int64_t>& hidden, int n_threads) const {
  if (n_ == 0 || top_k == 0) return {};
  return Search(*this, query, top_k, threshold, hidden).run(n_threads);
}

}  // namespace hiexp::retrieval
