// What follows each tile's matrix product in the log-prob operations on a CPU: one pass over a row that fits the L1
// cache where separate tensor operations take five over memory. Symbols as in hiexp/ops/_logprob_tiles.py.
#pragma once

#include <cstdint>

namespace hiexp::scoring {

// R rows of W columns of the logits, row stride given; `bias` (W) and `inverse_temperature` (R) may be null.
// `target` (R) is relative to the tile's first column and lies outside [0, W) for most tiles.
template <typename Real>
struct Tile {
  const Real* logits;
  int64_t rows, columns, stride;
  const Real* bias;
  const Real* inverse_temperature;
  const int64_t* target;
};

// Per row: maximum, sum of exponentials, their sum weighted by z - m, logit of the target.
template <typename Real>
struct State {
  Real *m, *s, *a, *z_y;
};

// Gradient per row: dz_v = p_v (constant - entropy (z_v - lse)) + target [v = y]; `entropy` may be null.
template <typename Real>
struct Upstream {
  const Real *lse, *target, *constant, *entropy;
};

// Merges a tile into `state`; the logits are only read. `a` is left alone unless `entropy` is true.
template <typename Real>
void forward_tile(const Tile<Real>& tile, const State<Real>& state, bool entropy, int n_threads);

// Writes the gradient with respect to the bare product plus bias to `out` (same stride), which may be the logits.
template <typename Real>
void backward_tile(const Tile<Real>& tile, const Upstream<Real>& upstream, Real* out, int n_threads);

}  // namespace hiexp::scoring
