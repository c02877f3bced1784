// What a query makes of the cells: for each column it reads, the largest product that each cell allows, as a byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "retrieval/exact_index.h"

namespace hiexp::retrieval {

// At most kChunk columns; the sum of their largest products is base + unit (sum of table entries).
struct Chunk {
  std::vector<int32_t>
      columns;  // within their stage; in pairs of a wide and a narrow one, so that two entries fit a byte
  std::vector<uint8_t> tables;  // (columns, kCells)
  float unit, base;
};

struct StageTables {
  std::vector<Chunk> chunks;
  float tail;  // norm of the columns of the query not read by the end of the stage
};

// `query` (d,) is turned like the rows; low and high (d,) are the extreme values of the columns.
std::vector<StageTables> make_tables(const std::vector<float>& query, const Layout& layout,
                                     const std::vector<float>& low, const std::vector<float>& high);

}  // namespace hiexp::retrieval
