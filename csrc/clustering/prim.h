// Minimum spanning tree of a complete graph whose edge lengths are at hand: O(n^2) time, O(n) memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clustering/method.h"
#include "clustering/monitor.h"
#include "clustering/thread_pool.h"

namespace hiexp::clustering {

// Prim (1957). `length(i, j)` is symmetric; the edges come by ascending length. Of equally near vertices the smallest
// number joins first.
template <typename Length>
std::vector<Merge> prim(size_t n, const Length& length, ThreadPool& pool, Monitor& monitor) {
  constexpr size_t kPerTask = 16384;
  struct Vertex {
    double best;
    int32_t id, from;
    bool operator<(const Vertex& other) const { return best < other.best || (best == other.best && id < other.id); }
  };
  std::vector<Vertex> rest;
  for (size_t i = 1; i < n; ++i) rest.push_back({kInfinity, static_cast<int32_t>(i), 0});
  std::vector<Merge> edges;
  std::vector<size_t> nearest((n + kPerTask - 1) / kPerTask);
  for (size_t joined = 0; !rest.empty();) {
    pool.run_ranges(rest.size(), kPerTask, [&](size_t begin, size_t end) {
      size_t best = begin;
      for (size_t r = begin; r < end; ++r) {
        const auto to_joined = static_cast<double>(length(joined, static_cast<size_t>(rest[r].id)));
        if (to_joined < rest[r].best) rest[r] = {to_joined, rest[r].id, static_cast<int32_t>(joined)};
        if (rest[r] < rest[best]) best = r;
      }
      nearest[begin / kPerTask] = best;
    });
    size_t chosen = nearest[0];
    for (size_t task = 1; task * kPerTask < rest.size(); ++task) {
      if (rest[nearest[task]] < rest[chosen]) chosen = nearest[task];
    }
    edges.push_back({rest[chosen].from, rest[chosen].id, rest[chosen].best});
    joined = static_cast<size_t>(rest[chosen].id);
    rest[chosen] = rest.back();
    rest.pop_back();
    monitor.advance(1);
  }
  std::stable_sort(edges.begin(), edges.end(),
                   [](const Merge& left, const Merge& right) { return left.height < right.height; });
  return edges;
}

}  // namespace hiexp::clustering
