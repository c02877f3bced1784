// Compilation for several x86-64 levels in one binary; the loader or a run-time check picks one.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define HIEXP_LEVELS 1
#define HIEXP_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HIEXP_LEVELS 0
#define HIEXP_CLONES
#endif
#define HIEXP_INLINE __attribute__((always_inline)) inline
