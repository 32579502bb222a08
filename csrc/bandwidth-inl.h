// The memory bandwidth that kernels are judged by.
#ifndef DEADBAND_BANDWIDTH_INL_H
#define DEADBAND_BANDWIDTH_INL_H

#include <stdint.h>
#include <string.h>

#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Touches every byte; the result only keeps the loads alive. Several streams at once, each fetched a kilobyte ahead:
// one plain stream reached 60 % of this, and prefetching past the caches (NTA) half.
uint64_t read(const void* data, int64_t bytes, int threads) {
  constexpr int kStreams = 8, kAhead = 1024;
  uint64_t result = 0;
  parallel(threads, [&](int part, int parts) {
    Range mine = share(bytes, 4096, part, parts);
    const char* p = (const char*)data + mine.begin;
    int64_t run = (mine.end - mine.begin) / kStreams;
    Vu seen[kStreams] = {};
    int64_t i = 0;
    for (; i + 64 <= run; i += 64)
      for (int s = 0; s < kStreams; ++s) {
        __builtin_prefetch(p + s * run + i + kAhead, 0, 2);
        for (int k = 0; k < 64; k += kVectorBytes) {
          Vu v;
          memcpy(&v, p + s * run + i + k, sizeof v);
          seen[s] |= v;
        }
      }
    uint64_t local = 0;
    for (int s = 0; s < kStreams; ++s) {
      for (int64_t j = i; j < run; ++j) local |= (uint8_t)p[s * run + j];
      for (int lane = 0; lane < kLanes; ++lane) local |= seen[s][lane];
    }
    __atomic_fetch_or(&result, local, __ATOMIC_RELAXED);
  });
  return result;
}

}  // namespace
}  // namespace deadband

#endif
