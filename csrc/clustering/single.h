// Single linkage without a matrix: Boruvka's minimum spanning tree with certified lists, O(n d) memory.
#pragma once

#include <vector>

#include "clustering/method.h"
#include "clustering/monitor.h"
#include "clustering/points.h"

namespace hiexp::clustering {

// Edges of the minimum spanning tree with length < threshold (longer ones may be there: the caller cuts exactly), as
// merges between input rows, ascending. Metric: euclidean, sqeuclidean or cosine (unit rows).
std::vector<Merge> spanning_tree(const Points& points, Metric metric, double threshold, ThreadPool& pool,
                                 Monitor& monitor);

}  // namespace hiexp::clustering
