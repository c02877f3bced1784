// A symmetric matrix without its diagonal: the strictly lower triangle, row after row, in huge pages where the system
// has them (a walk down a column touches a new page with every element).
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hiexp::clustering {

// Number of elements before row i. The even factor is halved first: i (i - 1) itself may be twice what fits.
inline size_t triangle_offset(size_t i) { return i % 2 == 0 ? i / 2 * (i - (i > 0)) : (i - 1) / 2 * i; }

template <typename T>
class Triangle {
 public:
  // Uninitialised. Throws std::bad_alloc.
  explicit Triangle(size_t n) : values_(allocate(triangle_offset(n) * sizeof(T))) {}

  T* row(size_t i) { return values_.get() + triangle_offset(i); }  // (i,)
  const T* row(size_t i) const { return values_.get() + triangle_offset(i); }
  T& at(size_t i, size_t j) { return i > j ? row(i)[j] : row(j)[i]; }
  T at(size_t i, size_t j) const { return i > j ? row(i)[j] : row(j)[i]; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };

  static T* allocate(size_t bytes) {
    constexpr size_t kHuge = size_t{1} << 21;
    const size_t alignment = bytes < kHuge ? 64 : kHuge;
    void* memory = std::aligned_alloc(alignment, (bytes / alignment + 1) * alignment);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == kHuge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }

  std::unique_ptr<T, Free> values_;
};

}  // namespace hiexp::clustering
