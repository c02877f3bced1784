// One search of an ExactIndex: all blocks are read stage by stage; after each stage the most promising points are
// scored, and only blocks go on that can still reach what was found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "clustering/thread_pool.h"
#include "retrieval/exact_index.h"
#include "retrieval/kernels.h"
#include "retrieval/query_tables.h"

namespace hiexp::retrieval {

namespace {

constexpr size_t kLeaders = 16;  // blocks whose most promising point is scored after a stage, before others are judged
constexpr size_t kBlocksPerThread = 64;
constexpr double kDecimals = 1e6;                                // scores are rounded to six
constexpr double kRounding = 1e-6;                               // more than rounding can lift a score
constexpr float kOut = -std::numeric_limits<float>::infinity();  // sum of a point that needs no score, or no other one
constexpr double kLargest = 1e30;  // bound of |query| |point| up to which no float overflows on the way

}  // namespace

class ExactIndex::Search {
 public:
  Search(const ExactIndex& index, const float* query, size_t top_k, std::optional<double> threshold,
         const std::vector<int64_t>& hidden);
  std::vector<Found> run(int n_threads);

 private:
  // What one thread has found: a heap whose front is the worst.
  using Best = std::vector<Found>;

  void scan(size_t begin, size_t end, Best& best);
  void read_stage(size_t stage, size_t block, const Best& best);
  void read_dense(size_t stage, size_t block, const Line* lines, size_t width, float lowest);
  void read_sparse(size_t stage, size_t block, const Line* lines, size_t width);
  void score_leader(size_t stage, size_t block, Best& best);
  bool goes_on(size_t stage, size_t block, Best& best);
  void score(size_t point, Best& best);
  float bounds(size_t stage, size_t block, float* out) const;
  size_t count(size_t block) const { return std::min(kBlock, index_.points_.size() - block * kBlock); }
  double least(size_t row) const { return threshold_ ? *threshold_ : index_.least_[row]; }
  float floor(size_t block, const Best& best) const;

  const ExactIndex& index_;
  size_t top_k_;
  std::optional<double> threshold_;
  const std::vector<int64_t>& hidden_;
  std::vector<double> query_;
  std::vector<StageTables> stages_;
  float slack_ = 0.0F, slope_ = 0.0F;                                      // rounding of a sum: slack_ + slope_ |point|
  std::atomic<double> reached_{-std::numeric_limits<double>::infinity()};  // by the top_k-th best of any thread
  float* sums_ = nullptr;   // (blocks, kBlock) of the stages read, or kOut
  std::vector<float> top_;  // (blocks,) the largest bound of a block
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
  const double norm = std::sqrt(std::inner_product(query_.begin(), query_.end(), query_.begin(), 0.0));
  const float longest = *std::max_element(index.block_norm_.begin(), index.block_norm_.end());
  if (layout.ends.empty() || !(norm * longest * static_cast<double>(d) < kLargest)) return;
  std::vector<float> turned(query, query + d);
  if (!layout.rotation.empty()) turn(query, layout.rotation.data(), d, turned.data());
  stages_ = make_tables(turned, layout, index.low_, index.high_);
  double largest = 0.0;  // of any sum on the way
  for (size_t c = 0; c < d; ++c) {
    double extent = std::max(std::abs(index.low_[c]), std::abs(index.high_[c]));
    if (layout.dense()) extent = std::max(std::abs(layout.centre(0, c, d)), std::abs(layout.centre(kCells, c, d)));
    largest += 3.0 * std::abs(static_cast<double>(turned[c])) * extent;  // base and cells apart
  }
  const double additions = static_cast<double>(2 * stages_.size() + 2 * d / kChunk + 8);
  slack_ = static_cast<float>(largest * additions * 0x1p-23);
  slope_ = static_cast<float>(norm * layout.relative * 1.01);
}

// The score below which no row of the block can be returned, less what rounding can add.
float ExactIndex::Search::floor(size_t block, const Best& best) const {
  double lowest = std::max(threshold_ ? *threshold_ : index_.block_least_[block], reached_.load());
  if (best.size() == top_k_) lowest = std::max(lowest, best.front().score);
  const double reach = lowest - kRounding - 1e-6 * std::abs(lowest);
  return std::nextafter(static_cast<float>(reach), -std::numeric_limits<float>::infinity());
}

float ExactIndex::Search::bounds(size_t stage, size_t block, float* out) const {
  return upper_bounds(sums_ + block * kBlock, index_.tails_[stage].data() + block * kBlock, stages_[stage].tail,
                      slack_ + slope_ * index_.block_norm_[block], out);
}

void ExactIndex::Search::read_stage(size_t stage, size_t block, const Best& best) {
  const size_t width = index_.layout_.ends[stage] - (stage > 0 ? index_.layout_.ends[stage - 1] : 0);
  const Line* lines = index_.cells_[stage].data() + block * lines_of(index_.layout_, width);
  if (stage == 0) std::fill_n(sums_ + block * kBlock, kBlock, 0.0F);
  if (index_.layout_.dense()) {
    read_dense(stage, block, lines, (width + 7) / 8, floor(block, best));
  } else {
    read_sparse(stage, block, lines, width);
  }
  alignas(64) float bound[kBlock];
  top_[block] = bounds(stage, block, bound);
}

void ExactIndex::Search::read_sparse(size_t stage, size_t block, const Line* lines, size_t width) {
  for (const Chunk& chunk : stages_[stage].chunks) {
    alignas(64) uint16_t cells[kBlock];
    add_cells(lines, width, chunk.columns.data(), chunk.tables.data(), chunk.columns.size(), cells);
    add_scaled(cells, chunk.unit, chunk.base, sums_ + block * kBlock);
  }
}

// Groups of points that are out since the last stage are not read.
void ExactIndex::Search::read_dense(size_t stage, size_t block, const Line* lines, size_t width, float lowest) {
  alignas(64) float bound[kBlock];
  if (stage > 0) bounds(stage - 1, block, bound);
  const Weights& weights = stages_[stage].weights;
  for (size_t group = 0; group < kBlock / kGroup; ++group) {
    float* sum = sums_ + block * kBlock + group * kGroup;
    const float* of_group = bound + group * kGroup;
    if (stage > 0 && std::all_of(of_group, of_group + kGroup, [&](float value) { return value < lowest; })) {
      std::fill_n(sum, kGroup, kOut);
      continue;
    }
    add_products(lines + group * width, weights.high.data(), weights.low.data(), width, weights.unit, weights.base,
                 sum);
  }
}

void ExactIndex::Search::score_leader(size_t stage, size_t block, Best& best) {
  alignas(64) float bound[kBlock];
  bounds(stage, block, bound);
  const size_t leader = static_cast<size_t>(std::max_element(bound, bound + count(block)) - bound);
  if (!(bound[leader] < floor(block, best))) score(block * kBlock + leader, best);
}

// Whether a block needs the next stage; scores what is left of it once all is read.
bool ExactIndex::Search::goes_on(size_t stage, size_t block, Best& best) {
  if (top_[block] < floor(block, best)) return false;
  if (stage + 1 < stages_.size()) return true;
  alignas(64) float bound[kBlock];
  bounds(stage, block, bound);
  for (size_t lane = 0; lane < count(block); ++lane) {
    if (!(bound[lane] < floor(block, best))) score(block * kBlock + lane, best);
  }
  return false;
}

void ExactIndex::Search::score(size_t point, Best& best) {
  if (sums_ != nullptr) {
    if (sums_[point] == kOut) return;
    sums_[point] = kOut;
  }
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

void ExactIndex::Search::scan(size_t begin, size_t end, Best& best) {
  std::vector<size_t> alive(end - begin), leaders(std::min(kLeaders, end - begin));
  std::iota(alive.begin(), alive.end(), begin);
  for (size_t stage = 0; stage < stages_.size() && !alive.empty(); ++stage) {
    for (const size_t block : alive) read_stage(stage, block, best);
    const auto last = std::partial_sort_copy(alive.begin(), alive.end(), leaders.begin(), leaders.end(),
                                             [&](size_t a, size_t b) { return top_[a] > top_[b]; });
    for (auto block = leaders.begin(); block != last; ++block) score_leader(stage, *block, best);
    if (best.size() == top_k_) {
      double reached = reached_.load();
      while (reached < best.front().score && !reached_.compare_exchange_weak(reached, best.front().score)) {
      }
    }
    const auto dead = [&](size_t block) { return !goes_on(stage, block, best); };
    alive.erase(std::remove_if(alive.begin(), alive.end(), dead), alive.end());
  }
}

std::vector<Found> ExactIndex::Search::run(int n_threads) {
  const size_t blocks = index_.n_blocks();
  const size_t ranges = std::clamp<size_t>(blocks / kBlocksPerThread, 1, static_cast<size_t>(n_threads));
  std::vector<Best> found(ranges);
  if (stages_.empty()) {
    for (size_t point = 0; point < index_.points_.size(); ++point) score(point, found[0]);
  } else {
    static thread_local std::vector<float> sums;  // kept: fresh pages cost more than a stage
    if (sums.size() < blocks * kBlock) sums.resize(blocks * kBlock);
    sums_ = sums.data();
    top_.resize(blocks);
    clustering::ThreadPool pool(static_cast<int>(ranges));
    pool.run(ranges, [&](size_t i) { scan(blocks * i / ranges, blocks * (i + 1) / ranges, found[i]); });
  }
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
