// What a query makes of the cells: tables of the largest product that each cell of a sparse column allows, in bytes;
// integer weights of dense columns.
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

// The weights of dense columns as integers of 15 bits: 128 high + low units.
struct Weights {
  std::vector<int8_t> high, low;  // (columns of the stage, to the next multiple of 8)
  float unit, base;
};

struct StageTables {
  std::vector<Chunk> chunks;  // sparse vectors
  Weights weights;            // dense vectors
  float tail;                 // norm of the query's part of what is open after the stage
};

// `query` (d,) is turned like the rows; low and high (d,) are the extreme values of the columns.
std::vector<StageTables> make_tables(const std::vector<float>& query, const Layout& layout,
                                     const std::vector<float>& low, const std::vector<float>& high);

}  // namespace hiexp::retrieval
