// See query_tables.h.
#include "retrieval/query_tables.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace hiexp::retrieval {

namespace {

constexpr double kUp = 1.0 + 1e-6;  // a float rounded upwards: bounds must not fall below the truth

// The largest product of each cell of one column.
struct Column {
  int32_t index;  // within the stage
  double least, range;
  std::array<double, kCells> products;
};

Column largest_products(double weight, const float* edges, size_t n_edges, size_t d, double low, double high) {
  Column column{};
  for (size_t cell = 0; cell <= n_edges; ++cell) {
    double end = weight > 0.0 ? high : low;
    if (weight > 0.0 && cell < n_edges) end = std::clamp<double>(edges[cell * d], low, high);
    if (weight < 0.0 && cell > 0) end = std::clamp<double>(edges[(cell - 1) * d], low, high);
    column.products[cell] = weight * end;
  }
  // Products rise or fall from cell to cell.
  column.least = std::min(column.products[0], column.products[n_edges]);
  column.range = std::max(column.products[0], column.products[n_edges]) - column.least;
  return column;
}

Chunk make_chunk(std::vector<Column> columns, size_t n_edges) {
  const auto wider = [](const Column& a, const Column& b) { return a.range > b.range; };
  std::sort(columns.begin(), columns.end(), wider);
  Chunk chunk{};
  double base = 0.0;
  // Rounding upwards costs a column up to a unit: one that spans less is counted at its largest, and not read.
  const double narrow = columns[0].range / 253;
  for (; !columns.empty() && columns.back().range <= narrow; columns.pop_back()) {
    base += columns.back().least + columns.back().range;
  }
  if (columns.size() % 2 == 1) columns.push_back({columns[0].index, 0.0, 0.0, {}});
  const size_t n = columns.size();
  double widest = 1e-30;  // no unit so small that a float loses its digits
  for (size_t i = 0; i < n / 2; ++i) widest = std::max(widest, columns[i].range + columns[n - 1 - i].range);
  const double unit = widest / 253;  // both entries are rounded upwards
  for (size_t i = 0; i < n; ++i) {
    const Column& column = columns[i % 2 == 0 ? i / 2 : n - 1 - i / 2];
    base += column.least;
    chunk.columns.push_back(column.index);
    for (size_t cell = 0; cell < kCells; ++cell) {
      const double steps = cell <= n_edges ? std::ceil((column.products[cell] - column.least) / unit) : 0.0;
      chunk.tables.push_back(static_cast<uint8_t>(steps));
    }
  }
  chunk.unit = static_cast<float>(unit * kUp);
  chunk.base = static_cast<float>(base);
  return chunk;
}

}  // namespace

std::vector<StageTables> make_tables(const std::vector<float>& query, const Layout& layout,
                                     const std::vector<float>& low, const std::vector<float>& high) {
  const size_t d = query.size(), n_edges = layout.edges.size() / d;
  std::vector<StageTables> stages;
  size_t begin = 0;
  for (const size_t end : layout.ends) {
    StageTables stage;
    std::vector<Column> columns;
    const auto flush = [&] {
      if (!columns.empty()) stage.chunks.push_back(make_chunk(std::move(columns), n_edges));
      columns.clear();
    };
    for (size_t c = begin; c < end; ++c) {
      if (query[c] == 0.0F) continue;
      columns.push_back(largest_products(query[c], layout.edges.data() + c, n_edges, d, low[c], high[c]));
      columns.back().index = static_cast<int32_t>(c - begin);
      if (columns.size() == kChunk) flush();
    }
    flush();
    double rest = 0.0;
    for (size_t c = end; c < d; ++c) rest += static_cast<double>(query[c]) * query[c];
    stage.tail = static_cast<float>(std::sqrt(rest) * kUp);
    stages.push_back(std::move(stage));
    begin = end;
  }
  return stages;
}

}  // namespace hiexp::retrieval
