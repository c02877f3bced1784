// HIEXP_HD marks what runs on the host and, compiled by nvcc, on the device too; atomics that do the same on both. On
// the host nothing runs beside them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HIEXP_HD __host__ __device__
// Before a template that calls its argument, which lives on one side only.
#define HIEXP_ANY_SIDE _Pragma("nv_exec_check_disable")
#else
#define HIEXP_HD
#define HIEXP_ANY_SIDE
#endif

namespace hiexp::clustering {

template <typename T>
HIEXP_HD inline T atomic_add(T* target, T value) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(target, value);
#else
  const T old = *target;
  *target = old + value;
  return old;
#endif
}

template <typename T>
HIEXP_HD inline void atomic_min(T* target, T value) {
#if defined(__CUDA_ARCH__)
  atomicMin(target, value);
#else
  if (value < *target) *target = value;
#endif
}

template <typename T>
HIEXP_HD inline T atomic_exchange(T* target, T value) {
#if defined(__CUDA_ARCH__)
  return atomicExch(target, value);
#else
  const T old = *target;
  *target = value;
  return old;
#endif
}

// Stores `value` where `expected` is; returns what was there.
template <typename T>
HIEXP_HD inline T atomic_replace(T* target, T expected, T value) {
#if defined(__CUDA_ARCH__)
  return atomicCAS(target, expected, value);
#else
  const T old = *target;
  if (old == expected) *target = value;
  return old;
#endif
}

}  // namespace hiexp::clustering
