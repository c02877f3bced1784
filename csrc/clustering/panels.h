// Candidates for nearest neighbours: float32 products with a proven error bound over a packed copy of the centroids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "clustering/monitor.h"
#include "clustering/thread_pool.h"

namespace hiexp::clustering {

// A slot and a lower bound on its cost.
struct Candidate {
  float bound;
  int32_t slot;
};

class Panels {
 public:
  // `weighted` multiplies squared distances by 2ab/(a+b), the weight of ward; `centre` (d,) is subtracted from every
  // row.
  Panels(size_t slots, size_t d, bool weighted, std::vector<double> centre);

  // Stores a cluster: its centroid (d,), the sum `spread` it adds to every cost, and its number of members.
  void set(size_t slot, const double* centroid, double spread, double size);
  void remove(size_t slot);
  void resize(size_t slots);  // keeps the first slots

  // For every row the `keep` columns with the smallest lower bounds, sorted by (bound, slot), itself left out: no
  // column that is left out costs less than the last bound. Rows with fewer columns are filled up with (infinity, -1).
  // With `group` (slots,) columns of the row's own group are left out too. Returns (rows, keep).
  std::vector<Candidate> scan(const std::vector<int32_t>& rows, size_t keep, const int32_t* group,
                              ThreadPool& pool) const;

  // The same for all slots at once, for half the work: a product serves its row and its column. Returns (slots, keep).
  std::vector<Candidate> scan_all(size_t keep, const int32_t* group, ThreadPool& pool, Monitor& monitor) const;

  // From here on some cluster may have more than one member; until then the weight of ward is 1.
  void sizes_differ() { sizes_differ_ = true; }

 private:
  struct Range {
    size_t row_begin, row_end, panel_begin, panel_end;
  };
  struct Tile;
  struct Lane;
  void scan_block(const Range& range, const std::vector<int32_t>& rows, size_t keep, const int32_t* group,
                  Candidate* out) const;
  void scan_tile(const float* packed, size_t panel, const int32_t* rows, size_t n_rows, size_t keep,
                 const int32_t* group, Candidate* out) const;
  std::vector<Range> upper_tasks() const;
  void scan_upper_block(const Range& range, const int32_t* group, Lane& lane) const;
  void scan_upper_tile(const float* packed, size_t panel, size_t first, size_t n_rows, const int32_t* group,
                       Lane& lane) const;
  bool plain() const { return !weighted_ || !sizes_differ_; }
  float key(float t, float size_row, float size_column) const;
  size_t panels_per_task() const;
  std::vector<float> pack(const int32_t* rows, size_t n_rows) const;
  size_t rows_per_block() const;
  float* column(size_t slot) const;

  struct Free {
    void operator()(float* memory) const;
  };
  size_t slots_, d_;
  bool weighted_;
  bool sizes_differ_ = false;
  std::vector<double> centre_;
  std::unique_ptr<float[], Free> values_;  // (panels, d, kPanelColumns)
  std::vector<float> q_;                   // |centroid|^2 + spread less the error; infinity where nothing is stored
  std::vector<float> size_;
};

}  // namespace hiexp::clustering
