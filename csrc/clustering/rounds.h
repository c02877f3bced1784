// Rounds of reciprocal nearest neighbours: the dendrogram of any reducible method over any Space.
#pragma once

#include <cstdint>
#include <vector>

#include "clustering/method.h"
#include "clustering/monitor.h"
#include "clustering/space.h"

namespace hiexp::clustering {

// Merges in an order in which children come before parents; leaves are named by `ids` (one per slot). Merges at a
// height of `threshold` or more are left out (some may be there: the caller cuts exactly).
std::vector<Merge> reciprocal_rounds(Space& space, std::vector<int32_t> ids, double threshold, Monitor& monitor);

}  // namespace hiexp::clustering
