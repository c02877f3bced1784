// Which lane holds what in mma.sync.m16n8k16 (f16 operands, f32 sums) and ldmatrix.x4, after the PTX manual's figures
// ("Matrix fragments for mma.m16n8k16", "ldmatrix"). Host code too, so that a test can check the maps against a plain
// product. Both operands lie row by row along k in shared memory, which is what the "row.col" form wants.
#pragma once

#include "clustering/host_device.h"

namespace hiexp::clustering::device::tile {

// ldmatrix.x4 loads four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8.
// Operand A, 16 rows x 16 k: matrices (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
HIEXP_HD inline int a_row(int lane) { return lane % 16; }
HIEXP_HD inline int a_k(int lane) { return lane / 16 * 8; }

// Operand B for two neighbouring products, 16 columns x 16 k: (columns 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15,
// 8-15); registers 0 and 1 belong to the first product, 2 and 3 to the second.
HIEXP_HD inline int b_column(int lane) { return lane % 8 + lane / 16 * 8; }
HIEXP_HD inline int b_k(int lane) { return lane / 8 % 2 * 8; }

// Sum i (0..3) of a lane belongs to this row and column of the 16 x 8 product.
HIEXP_HD inline int c_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
HIEXP_HD inline int c_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

}  // namespace hiexp::clustering::device::tile
