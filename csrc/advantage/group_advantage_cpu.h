// Group advantage on the CPU: plain pointers in, plain pointers out; Python has checked the shapes.
#pragma once

#include "advantage/batch.h"

namespace hiexp::advantage {

template <typename Real>
void group_advantage(const Batch<Real>& batch, const Options& options, const Result<Real>& result);

}  // namespace hiexp::advantage
