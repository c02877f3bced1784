// See rounds.h.
//
// Two clusters that are nearest to each other may merge at once: for reducible methods this gives the tree that merging
// the closest pair first gives (Bruynooghe 1977; Murtagh 1983). A neighbour stays the nearest until it merges itself.
// State of a cluster:
//   certified  its nearest neighbour is known
//   stale      the neighbour merged; what the space still knows may be enough
//   open       only a scan can tell. Scans are by demand: only where a certified cluster points to.
// Pairs are recognised by value too (the neighbour's own smallest cost equals ours), so ties cannot close a cycle.
// When scans pay badly (many scans, few merges: chains and stars), one cluster at a time is scanned along a single
// chain of nearest neighbours, which needs about three scans a merge. So all scans together stay linear in the number
// of merges.
#include "clustering/rounds.h"

#include <algorithm>

namespace hiexp::clustering {

namespace {

enum class State : uint8_t { empty, stale, open, certified };

// The edge of a threshold is decided on heights at the end; here a cluster must be safely above it.
constexpr double kRetireMargin = 1.0 + 1e-9;

// A scan may take this many clusters, and this many more for each merge since the last one, until the chain takes over.
constexpr size_t kFreeScans = 8;
constexpr size_t kScansPerMerge = 8;

class Rounds {
 public:
  Rounds(Space& space, std::vector<int32_t> ids, double threshold, Monitor& monitor)
      : space_(space),
        ids_(std::move(ids)),
        threshold_(threshold),
        monitor_(monitor),
        state_(ids_.size(), State::open),
        nearest_(ids_.size(), Neighbour{-1, 0.0}),
        alive_(ids_.size()) {}

  std::vector<Merge> run() {
    while (alive_ > 1) {
      monitor_.poll();
      ++monitor_.stats.rounds;
      update(slots_in(State::stale), false);
      retire();
      std::vector<Pair> pairs = reciprocal_pairs();
      if (pairs.empty()) {
        if (alive_ < 2) break;
        const std::vector<int32_t> rows = rows_to_scan();
        update(rows, true);
        retire();
        pairs = reciprocal_pairs();
        if (pairs.empty() && rows.empty()) pairs = cheapest_edge();
      }
      merge(pairs);
      monitor_.advance(pairs.size());
      compact();
    }
    return std::move(merges_);
  }

 private:
  std::vector<int32_t> slots_in(State state) const {
    std::vector<int32_t> slots;
    for (size_t i = 0; i < state_.size(); ++i) {
      if (state_[i] == state) slots.push_back(static_cast<int32_t>(i));
    }
    return slots;
  }

  void update(const std::vector<int32_t>& rows, bool scan) {
    if (rows.empty()) return;
    const std::vector<Neighbour> found = space_.nearest(rows, scan);
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto i = static_cast<size_t>(rows[r]);
      const bool known = found[r].slot >= 0 || scan;
      state_[i] = known ? State::certified : State::open;
      nearest_[i] = found[r];
    }
  }

  // A cluster whose nearest neighbour is beyond the threshold never merges below it, nor is it anyone's partner there.
  void retire() {
    if (threshold_ == kInfinity) return;
    for (size_t i = 0; i < state_.size(); ++i) {
      if (state_[i] != State::certified && state_[i] != State::open) continue;
      const bool alone = state_[i] == State::certified && !has_partner(i);
      if (!alone && space_.height(nearest_[i].cost) < threshold_ * kRetireMargin) continue;
      state_[i] = State::empty;
      --alive_;
    }
  }

  bool has_partner(size_t i) const {
    return nearest_[i].slot >= 0 && state_[static_cast<size_t>(nearest_[i].slot)] != State::empty;
  }

  std::vector<Pair> reciprocal_pairs() const {
    std::vector<Pair> pairs;
    std::vector<bool> taken(state_.size(), false);
    for (size_t i = 0; i < state_.size(); ++i) {
      if (state_[i] != State::certified || nearest_[i].slot < 0 || taken[i]) continue;
      const auto j = static_cast<size_t>(nearest_[i].slot);
      if (taken[j] || state_[j] != State::certified) continue;
      const bool tied = space_.exact_costs() && nearest_[j].cost == nearest_[i].cost;
      if (nearest_[j].slot != static_cast<int32_t>(i) && !tied) continue;
      taken[i] = taken[j] = true;
      pairs.push_back({static_cast<int32_t>(std::min(i, j)), static_cast<int32_t>(std::max(i, j)), nearest_[i].cost});
    }
    return pairs;
  }

  // Rounding may give a merged cluster a cost one unit below what reducibility allows, and so a cycle of neighbours
  // whose costs differ in the last place: the cheapest edge of all is the right merge then.
  std::vector<Pair> cheapest_edge() const {
    Pair best{-1, -1, kInfinity};
    for (size_t i = 0; i < state_.size(); ++i) {
      if (state_[i] != State::certified || nearest_[i].slot < 0 || nearest_[i].cost >= best.cost) continue;
      const auto slot = static_cast<int32_t>(i);
      best = {std::min(slot, nearest_[i].slot), std::max(slot, nearest_[i].slot), nearest_[i].cost};
    }
    return best.keep < 0 ? std::vector<Pair>{} : std::vector<Pair>{best};
  }

  std::vector<int32_t> rows_to_scan() {
    std::vector<bool> wanted(state_.size(), false);
    std::vector<int32_t> rows;
    for (size_t i = 0; i < state_.size(); ++i) {
      if (state_[i] != State::certified || nearest_[i].slot < 0) continue;
      const auto j = static_cast<size_t>(nearest_[i].slot);
      if (state_[j] != State::open || wanted[j]) continue;
      wanted[j] = true;
      rows.push_back(nearest_[i].slot);
    }
    if (rows.empty()) return slots_in(State::open);
    const size_t allowed = kFreeScans + kScansPerMerge * merged_since_scan_;
    merged_since_scan_ = 0;
    if (rows.size() > allowed) return {chain_end()};
    return rows;
  }

  // Follows nearest neighbours from a start that stays the same while it lives, to the first cluster that needs a scan.
  int32_t chain_end() {
    for (size_t i = chain_start_, steps = 0; i < state_.size() && steps < state_.size(); ++steps) {
      if (state_[i] == State::open) return static_cast<int32_t>(i);
      if (state_[i] != State::certified || nearest_[i].slot < 0) break;
      i = static_cast<size_t>(nearest_[i].slot);
    }
    chain_start_ = 0;
    while (!leads_somewhere(chain_start_)) ++chain_start_;
    return nearest_[chain_start_].slot;
  }

  bool leads_somewhere(size_t i) const {
    return state_[i] == State::certified && nearest_[i].slot >= 0 &&
           state_[static_cast<size_t>(nearest_[i].slot)] == State::open;
  }

  void merge(std::vector<Pair>& pairs) {
    merged_since_scan_ += pairs.size();
    if (pairs.empty()) return;
    space_.settle(pairs);
    std::vector<bool> touched(state_.size(), false);
    for (const Pair& pair : pairs) {
      const auto a = static_cast<size_t>(pair.keep), b = static_cast<size_t>(pair.drop);
      merges_.push_back({ids_[a], ids_[b], space_.height(pair.cost)});
      touched[a] = touched[b] = true;
      state_[b] = State::empty;
    }
    alive_ -= pairs.size();
    space_.merge(pairs);
    for (size_t i = 0; i < state_.size(); ++i) {
      const bool lost =
          state_[i] == State::certified && nearest_[i].slot >= 0 && touched[static_cast<size_t>(nearest_[i].slot)];
      if (state_[i] != State::empty && (touched[i] || lost)) state_[i] = State::stale;
    }
  }

  // Halving keeps the total cost of renumbering below twice the first.
  void compact() {
    if (2 * alive_ > state_.size() || alive_ < 2) return;
    std::vector<int32_t> kept, renumbered(state_.size(), -1);
    for (size_t i = 0; i < state_.size(); ++i) {
      if (state_[i] == State::empty) continue;
      renumbered[i] = static_cast<int32_t>(kept.size());
      kept.push_back(static_cast<int32_t>(i));
    }
    space_.compact(kept);
    for (size_t i = 0; i < kept.size(); ++i) {
      const auto from = static_cast<size_t>(kept[i]);
      state_[i] = state_[from];
      ids_[i] = ids_[from];
      nearest_[i] = nearest_[from];
      if (nearest_[i].slot >= 0) nearest_[i].slot = renumbered[static_cast<size_t>(nearest_[i].slot)];
    }
    chain_start_ = chain_start_ < renumbered.size() && renumbered[chain_start_] >= 0
                       ? static_cast<size_t>(renumbered[chain_start_])
                       : kept.size();
    state_.resize(kept.size());
    ids_.resize(kept.size());
    nearest_.resize(kept.size());
  }

  Space& space_;
  std::vector<int32_t> ids_;
  double threshold_;
  Monitor& monitor_;
  std::vector<State> state_;
  std::vector<Neighbour> nearest_;
  size_t alive_;
  size_t merged_since_scan_ = 0;
  size_t chain_start_ = 0;
  std::vector<Merge> merges_;
};

}  // namespace

std::vector<Merge> reciprocal_rounds(Space& space, std::vector<int32_t> ids, double threshold, Monitor& monitor) {
  return Rounds(space, std::move(ids), threshold, monitor).run();
}

}  // namespace hiexp::clustering
