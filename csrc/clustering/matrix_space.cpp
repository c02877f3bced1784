// See matrix_space.h.
//
// Folding is in place. New row t covers old rows that are no smaller than t, and the smallest of them gives its first
// values; so old rows are taken in ascending order, a batch at a time: first every row of the batch is folded into a
// line of new columns (reads only), then the lines go to their places, which lie in rows read before.
#include "clustering/matrix_space.h"

#include <algorithm>

#include "clustering/matrix_kernels.h"

namespace hiexp::clustering {

namespace {

constexpr size_t kRowsPerTask = 32;
constexpr size_t kColumnsPerTask = 64;
constexpr size_t kRowsPerBatch = 64;
constexpr size_t kFoldPerTask = 1024;

// Chains longer than this are folded: a distance between two clusters takes at most the square of it.
constexpr int32_t kLongestChain = 8;

// Sums in another order may differ by this much (relative); the exact cost decides.
constexpr double kSlack = 1.0 - 1e-12;

}  // namespace

template <typename T>
MatrixSpace<T>::MatrixSpace(Triangle<T> triangle, Method method, std::vector<double> sizes, std::vector<int32_t> ids,
                            std::function<double(double)> height, ThreadPool& pool, Monitor& monitor)
    : ListedSpace(method, std::move(sizes), std::move(ids), pool, monitor),
      height_(std::move(height)),
      triangle_(std::move(triangle)),
      weights_(method == Method::weighted ? std::vector<double>(slots(), 1.0) : sizes_),
      total_(weights_),
      within_(slots(), 0.0) {
  reset_chains();
}

template <typename T>
void MatrixSpace<T>::reset_chains() {
  weights_ = total_;
  next_.assign(total_.size(), -1);
  length_.assign(total_.size(), 1);
  tail_.resize(total_.size());
  for (size_t i = 0; i < tail_.size(); ++i) tail_[i] = static_cast<int32_t>(i);
  live_.assign(total_.size(), 1);
}

template <typename T>
double MatrixSpace<T>::identity() const {
  return method_ == Method::complete ? -kInfinity : method_ == Method::single ? kInfinity : 0.0;
}

template <typename T>
double MatrixSpace<T>::fold(double total, double share, double value) const {
  if (method_ == Method::complete) return std::max(total, value);
  if (method_ == Method::single) return std::min(total, value);
  return total + share * value;
}

template <typename T>
double MatrixSpace<T>::value(size_t i, size_t j) const {
  if (length_[i] == 1 && length_[j] == 1) return static_cast<double>(triangle_.at(i, j));
  const size_t a = std::min(i, j), c = std::max(i, j);
  double result = identity();
  for (auto row = static_cast<int32_t>(a); row >= 0; row = next_[static_cast<size_t>(row)]) {
    double inner = identity();
    for (auto column = static_cast<int32_t>(c); column >= 0; column = next_[static_cast<size_t>(column)]) {
      const double entry = static_cast<double>(triangle_.at(static_cast<size_t>(row), static_cast<size_t>(column)));
      inner = fold(inner, share(static_cast<size_t>(column), c), entry);
    }
    result = fold(result, share(static_cast<size_t>(row), a), inner);
  }
  return result;
}

// Ward: the mean squared distance between two clusters is the squared distance of their means and what they spread.
template <typename T>
double MatrixSpace<T>::cost_of(size_t i, size_t j, double value) const {
  if (method_ != Method::ward) return value;
  return std::max(0.0, ward_weight(sizes_[i], sizes_[j]) * (value - (within_[i] + within_[j])));
}

template <typename T>
void MatrixSpace<T>::scan_rows(const std::vector<int32_t>& rows) {
  const bool all = untouched_ && rows.size() == slots();
  monitor_.stats.scanned += rows.size();
  monitor_.stats.certified += rows.size();
  if (all) return scan_all();
  monitor_.stats.rescans += rows.size();
  pool_.run_ranges(rows.size(), 4, [&](size_t begin, size_t end) {
    std::vector<double> line(slots());
    for (size_t r = begin; r < end; ++r) scan_row(static_cast<size_t>(rows[r]), line);
  });
}

// The first lists. Row i meets j < i along its row of the triangle, j > i down its column, many columns at a time.
template <typename T>
void MatrixSpace<T>::scan_all() {
  for (size_t i = 0; i < slots(); ++i) restart(i, kInfinity);
  pool_.run_ranges(slots(), kRowsPerTask, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) scan_above(i);
  });
  pool_.run_ranges(slots(), kColumnsPerTask, [&](size_t begin, size_t end) { scan_columns(begin, end); });
}

template <typename T>
void MatrixSpace<T>::scan_above(size_t row) {
  const T* values = triangle_.row(row);
  for (size_t j = 0;; ++j) {
    j = first_at_most(values, j, row, static_cast<T>(list_limit(row)));
    if (j == row) return;
    offer(row, j);
  }
}

template <typename T>
void MatrixSpace<T>::scan_columns(size_t first, size_t last) {
  T limits[kColumnsPerTask];
  for (size_t c = first; c < last; ++c) limits[c - first] = static_cast<T>(list_limit(c));
  for (size_t row = first + 1; row < slots(); ++row) {
    const T* values = triangle_.row(row) + first;
    const size_t width = std::min(row, last) - first;
    for (size_t c = 0;; ++c) {
      c = first_at_most(values, c, width, limits);
      if (c == width) break;
      offer(first + c, row);
      limits[c] = static_cast<T>(list_limit(first + c));
    }
  }
  for (size_t c = first; c < last; ++c) close(c);
}

template <typename T>
void MatrixSpace<T>::scan_row(size_t row, std::vector<double>& line) {
  std::fill(line.begin(), line.end(), identity());
  for (auto link = static_cast<int32_t>(row); link >= 0; link = next_[static_cast<size_t>(link)]) {
    const auto b = static_cast<size_t>(link);
    const double weight = share(b, row);
    const T* values = triangle_.row(b);
    for (size_t c = 0; c < b; ++c) line[c] = fold(line[c], weight, static_cast<double>(values[c]));
    for (size_t c = b + 1; c < slots(); ++c) {
      line[c] = fold(line[c], weight, static_cast<double>(triangle_.row(c)[b]));
    }
  }
  restart(row, kInfinity);
  double limit = kInfinity;
  for (size_t c = 0; c < slots(); ++c) {
    if (sizes_[c] == 0.0 || c == row) continue;
    double total = line[c];
    if (length_[c] > 1) {
      total = identity();
      for (auto link = static_cast<int32_t>(c); link >= 0; link = next_[static_cast<size_t>(link)]) {
        total = fold(total, share(static_cast<size_t>(link), c), line[static_cast<size_t>(link)]);
      }
    }
    if (cost_of(row, c, total * kSlack) > limit) continue;
    offer(row, c);
    limit = list_limit(row);
  }
  close(row);
}

template <typename T>
void MatrixSpace<T>::unite(const std::vector<Pair>& pairs) {
  untouched_ = false;
  pool_.run_ranges(pairs.size(), 64, [&](size_t begin, size_t end) {
    for (size_t p = begin; p < end; ++p) join_chains(pairs[p]);
  });
  for (const Pair& pair : pairs) {
    if (length_[static_cast<size_t>(pair.keep)] > kLongestChain) fold_chain(static_cast<size_t>(pair.keep));
  }
}

template <typename T>
void MatrixSpace<T>::join_chains(const Pair& pair) {
  const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
  if (method_ == Method::ward) {
    const double share = sizes_[b] / (sizes_[a] + sizes_[b]), mean = value(a, b);
    within_[a] = (1.0 - share) * (1.0 - share) * within_[a] + share * share * within_[b] + share * (1.0 - share) * mean;
  }
  next_[static_cast<size_t>(tail_[a])] = pair.drop;
  tail_[a] = tail_[b];
  length_[a] += length_[b];
  length_[b] = 0;
  if (method_ != Method::weighted) {
    total_[a] += total_[b];
    return;
  }
  for (int32_t link = pair.keep; link >= 0; link = next_[static_cast<size_t>(link)]) {
    weights_[static_cast<size_t>(link)] /= 2.0;
  }
}

// The first row of the chain takes the distances of the whole cluster; the others are dead from here on.
template <typename T>
void MatrixSpace<T>::fold_chain(size_t slot) {
  std::vector<size_t> chain;
  for (auto link = static_cast<int32_t>(slot); link >= 0; link = next_[static_cast<size_t>(link)]) {
    chain.push_back(static_cast<size_t>(link));
    live_[chain.back()] = 0;
  }
  pool_.run_ranges(slots(), kFoldPerTask, [&](size_t begin, size_t end) {
    for (size_t c = begin; c < end; ++c) {
      if (!live_[c]) continue;
      double total = identity();
      for (const size_t row : chain) total = fold(total, share(row, slot), static_cast<double>(triangle_.at(row, c)));
      triangle_.at(slot, c) = static_cast<T>(total);
    }
  });
  live_[slot] = 1;
  next_[slot] = -1;
  tail_[slot] = static_cast<int32_t>(slot);
  length_[slot] = 1;
  weights_[slot] = total_[slot];
}

template <typename T>
void MatrixSpace<T>::renumber(const std::vector<int32_t>& kept) {
  const size_t m = kept.size();
  Folding folding{
      kept, std::vector<int32_t>(slots(), static_cast<int32_t>(m)), std::vector<double>(slots(), 0.0), {}, {}};
  for (size_t i = 0; i < m; ++i) {
    const auto slot = static_cast<size_t>(kept[i]);
    for (auto link = kept[i]; link >= 0; link = next_[static_cast<size_t>(link)]) {
      folding.group[static_cast<size_t>(link)] = static_cast<int32_t>(i);
      folding.shares[static_cast<size_t>(link)] = share(static_cast<size_t>(link), slot);
    }
  }
  folding.lines.resize(kRowsPerBatch * (m + 1));
  for (size_t row = 0; row < slots();) {
    folding.rows.clear();
    for (; row < slots() && folding.rows.size() < kRowsPerBatch; ++row) {
      if (folding.group[row] < static_cast<int32_t>(m)) folding.rows.push_back(row);
    }
    pool_.run(folding.rows.size(), [&](size_t r) { fold_row(folding, r); });
    const size_t parts = 2 * static_cast<size_t>(pool_.size());
    pool_.run(parts, [&](size_t part) { place_lines(folding, part * m / parts, (part + 1) * m / parts); });
  }
  for (size_t i = 0; i < m; ++i) {
    total_[i] = total_[static_cast<size_t>(kept[i])];
    within_[i] = within_[static_cast<size_t>(kept[i])];
  }
  total_.resize(m);
  within_.resize(m);
  reset_chains();
}

template <typename T>
void MatrixSpace<T>::fold_row(Folding& folding, size_t r) const {
  const size_t row = folding.rows[r], width = folding.kept.size() + 1;
  double* line = folding.lines.data() + r * width;
  std::fill_n(line, width, identity());
  const T* values = triangle_.row(row);
  for (size_t c = 0; c < row; ++c) {
    double& target = line[folding.group[c]];
    target = fold(target, folding.shares[c], static_cast<double>(values[c]));
  }
}

// Into the new rows [first, last).
template <typename T>
void MatrixSpace<T>::place_lines(const Folding& folding, size_t first, size_t last) {
  for (size_t r = 0; r < folding.rows.size(); ++r) {
    const size_t row = folding.rows[r], group = static_cast<size_t>(folding.group[row]);
    const double share = folding.shares[row];
    const double* line = folding.lines.data() + r * (folding.kept.size() + 1);
    const bool head = static_cast<size_t>(folding.kept[group]) == row;
    T* target = triangle_.row(group);
    for (size_t h = 0; h < group && first <= group && group < last; ++h) {
      target[h] = static_cast<T>(fold(head ? identity() : static_cast<double>(target[h]), share, line[h]));
    }
    // Clusters that begin behind this row have no distance in it.
    for (size_t h = std::max(first, group + 1); h < last && static_cast<size_t>(folding.kept[h]) < row; ++h) {
      T& entry = triangle_.row(h)[group];
      entry = static_cast<T>(fold(static_cast<double>(entry), share, line[h]));
    }
  }
}

template class MatrixSpace<double>;
template class MatrixSpace<float>;

}  // namespace hiexp::clustering
