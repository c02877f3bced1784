// All pair distances of the points, in float64 accuracy, into a triangle.
#pragma once

#include "clustering/monitor.h"
#include "clustering/points.h"
#include "clustering/triangle.h"

namespace hiexp::clustering {

// What a triangle holds: |x - y|^2, |x - y|, or the sum of |x_k - y_k|.
enum class Entry { square, distance, manhattan };

void fill_distances(const Points& points, Entry entry, Triangle<double>& triangle, ThreadPool& pool, Monitor& monitor);

}  // namespace hiexp::clustering
