// Clusters as sets of rows of a triangular distance matrix: complete, average and weighted over metrics without a
// centroid form, and every reducible method on precomputed distances.
#pragma once

#include <functional>
#include <vector>

#include "clustering/listed_space.h"
#include "clustering/triangle.h"

namespace hiexp::clustering {

// Merges change nothing in the matrix. A cluster is a short chain of its rows, and a distance between two clusters is
// computed from the entries of their chains when it is asked for. A chain that grows too long is folded into one row;
// `compact` folds all.
template <typename T>
class MatrixSpace : public ListedSpace {
 public:
  // Takes the distances of the points (squares for ward), how many input rows each point stands for, and their names.
  MatrixSpace(Triangle<T> triangle, Method method, std::vector<double> sizes, std::vector<int32_t> ids,
              std::function<double(double)> height, ThreadPool& pool, Monitor& monitor);

  double height(double cost) const override { return height_(cost); }

 protected:
  double cost(size_t i, size_t j) const override { return cost_of(i, j, value(i, j)); }
  void unite(const std::vector<Pair>& pairs) override;
  void renumber(const std::vector<int32_t>& kept) override;

 private:
  void scan_rows(const std::vector<int32_t>& rows) override;

  // How `renumber` folds the rows of a batch.
  struct Folding {
    const std::vector<int32_t>& kept;
    std::vector<int32_t> group;  // (slots,) new number of a row's cluster; kept.size() if it is left out
    std::vector<double> shares;  // (slots,) of a row in its cluster
    std::vector<size_t> rows;    // of the batch
    std::vector<double> lines;   // (rows, kept.size() + 1)
  };

  double identity() const;
  double fold(double total, double share, double value) const;
  double share(size_t row, size_t slot) const { return weights_[row] / total_[slot]; }
  double value(size_t i, size_t j) const;
  double cost_of(size_t i, size_t j, double value) const;
  void scan_all();
  void scan_above(size_t row);
  void scan_columns(size_t first, size_t last);
  void scan_row(size_t row, std::vector<double>& line);
  void join_chains(const Pair& pair);
  void fold_chain(size_t slot);
  void fold_row(Folding& folding, size_t r) const;
  void place_lines(const Folding& folding, size_t first, size_t last);
  void reset_chains();

  std::function<double(double)> height_;
  Triangle<T> triangle_;
  bool untouched_ = true;        // no merge yet
  std::vector<double> weights_;  // (slots,) of a row in the mean over its cluster, before division by the total
  std::vector<double> total_;    // (slots,) weight of a cluster
  std::vector<double> within_;   // (slots,) ward: mean squared distance of the members to their mean
  std::vector<int32_t> next_;    // (slots,) next row of the chain, -1 at its end
  std::vector<int32_t> tail_;    // (slots,) last row of a cluster's chain
  std::vector<int32_t> length_;  // (slots,) rows of a cluster's chain; 0 in an empty slot
  std::vector<uint8_t> live_;    // (slots,) whether the row is in a chain
};

}  // namespace hiexp::clustering
