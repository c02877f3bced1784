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

std::vector<Chunk> make_chunks(const std::vector<float>& query, const Layout& layout, const std::vector<float>& low,
                               const std::vector<float>& high, size_t begin, size_t end) {
  const size_t d = query.size(), n_edges = layout.edges.size() / d;
  std::vector<Chunk> chunks;
  std::vector<Column> columns;
  for (size_t c = begin; c < end; ++c) {
    if (query[c] != 0.0F) {
      columns.push_back(largest_products(query[c], layout.edges.data() + c, n_edges, d, low[c], high[c]));
      columns.back().index = static_cast<int32_t>(c - begin);
    }
    if (columns.size() == kChunk || (c + 1 == end && !columns.empty())) {
      chunks.push_back(make_chunk(columns, n_edges));
      columns.clear();
    }
  }
  return chunks;
}

Weights make_weights(const std::vector<float>& query, const Layout& layout, size_t begin, size_t end) {
  const size_t d = query.size(), padded = (end - begin + 7) / 8 * 8;
  double largest = 1e-30, base = 0.0;
  for (size_t c = begin; c < end; ++c) {
    largest = std::max(largest, std::abs(query[c] * layout.step(c, d)));
    base += query[c] * layout.centre(0, c, d);
  }
  const double unit = largest / 16'000;
  Weights weights{std::vector<int8_t>(padded), std::vector<int8_t>(padded), static_cast<float>(unit), 0.0F};
  for (size_t c = begin; c < end; ++c) {
    const double exact = query[c] * layout.step(c, d), steps = std::nearbyint(exact / unit);
    const double high = std::nearbyint(steps / 128);
    weights.high[c - begin] = static_cast<int8_t>(high);
    weights.low[c - begin] = static_cast<int8_t>(steps - 128 * high);
    // A bound from above: what rounding takes from the highest cell.
    base += static_cast<double>(kCells - 1) * std::abs(exact - steps * weights.unit);
  }
  weights.base = static_cast<float>(base);
  return weights;
}

}  // namespace

std::vector<StageTables> make_tables(const std::vector<float>& query, const Layout& layout,
                                     const std::vector<float>& low, const std::vector<float>& high) {
  std::vector<StageTables> stages;
  size_t begin = 0;
  for (const size_t end : layout.ends) {
    StageTables stage{};
    if (layout.dense()) {
      stage.weights = make_weights(query, layout, begin, end);
    } else {
      stage.chunks = make_chunks(query, layout, low, high, begin, end);
    }
    double open = 0.0;
    for (size_t c = 0; c < query.size(); ++c) {
      const double square = static_cast<double>(query[c]) * query[c];
      if (c >= end) open += square;
      if (c < end && layout.dense()) open += square / kErrorWeight;
    }
    stage.tail = static_cast<float>(std::sqrt(open) * kUp);
    stages.push_back(std::move(stage));
    begin = end;
  }
  return stages;
}

}  // namespace hiexp::retrieval
