// How work is shared out among threads, and the parallel region.
#ifndef DEADBAND_THREADS_INL_H
#define DEADBAND_THREADS_INL_H

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "sizes-inl.h"

namespace deadband {
namespace {

// Thread `part` of `parts` takes [begin, end) of `total`, cut at multiples of `step`.
struct Range {
  int64_t begin, end;
};
DEADBAND_INLINE Range share(int64_t total, int64_t step, int part, int parts) {
  int64_t steps = (total + step - 1) / step;
  return {min_of(total, steps * part / parts * step), min_of(total, steps * (part + 1) / parts * step)};
}

// A thread is worth waking for this many bytes of weights, multiply-adds of many rows, or entries of x.
constexpr int64_t kBytesPerThread = 128 << 10;
constexpr int64_t kOperationsPerThread = 1 << 20;
constexpr int64_t kEntriesPerThread = 16384;

DEADBAND_INLINE int threads_for(int64_t work, int64_t work_per_thread, int threads) {
  return (int)min_of(threads, 1 + work / work_per_thread);
}

// body(part, parts). One thread opens no parallel region: libgomp's threads do not survive a fork, and data loaders
// fork.
template <class Body>
void parallel(int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  body(0, 1);
}

}  // namespace
}  // namespace deadband

#endif
