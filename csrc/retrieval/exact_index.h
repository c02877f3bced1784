// Exact inner-product search that reads a fraction of the rows. Every distinct row is a point; of its rotated copy only
// the cells are kept in which its values lie, 16 a column, in blocks of points. Columns are read in stages, and points
// that cannot reach what was found so far are left. What remains is scored exactly, from the float32 rows.
//
// Dense vectors are rotated and have cells of equal width: the products of the cells' centres are sums of small
// integers, and what they and the columns not read yet leave open is at most |query's part| |point's part|
// (Cauchy-Schwarz). Sparse vectors keep their axes, of which a query has few: it makes a table of the largest product
// that each cell allows, and zero, which most values are, has a cell of its own and leaves nothing open.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "retrieval/kernels.h"

namespace hiexp::retrieval {

// A row that is served: scores are rounded to six decimals, ties go to the lower row.
struct Found {
  double score;
  int64_t row;
  bool operator<(const Found& other) const {  // better than
    return score != other.score ? score > other.score : row < other.row;
  }
};

// How points are coded. The default codes nothing: every point is then scored.
struct Layout {
  std::vector<float> rotation;  // (d, d) row-major, orthogonal up to `relative`; empty: none
  std::vector<float> edges;     // (at most kCells - 1, d) where the cells of each column meet, ascending down a column
  std::vector<size_t> ends;     // columns read by the end of each stage, ascending, the last is d; empty: no codes
  double relative = 0.0;        // rounding of the rotation, relative to |query| |point|

  bool dense() const { return !rotation.empty(); }
  // Of dense cells, whose edges are evenly spaced; d columns.
  double step(size_t column, size_t d) const {
    return (static_cast<double>(edges[(kCells - 2) * d + column]) - edges[column]) / (kCells - 2);
  }
  double centre(size_t cell, size_t column, size_t d) const {
    return edges[column] + (static_cast<double>(cell) - 0.5) * step(column, d);
  }
};

constexpr double kErrorWeight = 8.0;  // square of the weight of a column's coding error against a column not read:
                                      // normal values in 16 cells keep an error of about 1/8 of their spread

// Lines of a block that hold `width` columns of a stage.
inline size_t lines_of(const Layout& layout, size_t width) {
  return layout.dense() ? kBlock / kGroup * ((width + 7) / 8) : width;
}

class ExactIndex {
 public:
  // `rows` (n, d) must outlive the index; row i is served at scores >= least[i] where a search names no threshold.
  ExactIndex(const float* rows, size_t n, size_t d, std::vector<double> least, Layout layout);

  // The first row of each point, ascending.
  const std::vector<int64_t>& points() const { return points_; }

  // Codes `count` points from `first` on, given their rotated rows (count, d). Throws std::invalid_argument where a
  // value is not finite.
  void store(size_t first, const float* rotated, size_t count);

  // The `top_k` best rows for `query` (d,), best first, but those in `hidden` (ascending).
  std::vector<Found> search(const float* query, size_t top_k, std::optional<double> threshold,
                            const std::vector<int64_t>& hidden, int n_threads) const;

 private:
  class Search;
  void find_points();
  void put(const uint8_t* cells, size_t width, Line* lines, size_t lane) const;
  size_t n_blocks() const { return (points_.size() + kBlock - 1) / kBlock; }

  const float* rows_;
  size_t n_, d_;
  std::vector<double> least_;
  Layout layout_;
  std::vector<int64_t> points_;
  std::vector<int64_t> members_, member_begin_;  // rows of each point, ascending
  std::vector<double> block_least_;              // least score of any row of a block
  std::vector<std::vector<Line>> cells_;         // per stage (blocks, lines_of(its width))
  std::vector<std::vector<float>> tails_;        // per stage (points,) norm of what is open after it
  std::vector<float> block_norm_;                // largest norm of a point of the block
  std::vector<float> low_, high_;                // (d,) extreme values of each column
};

}  // namespace hiexp::retrieval
