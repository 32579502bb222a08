// The entries that a rule skips, set to zero or to their center, for products that are dense: training and many rows.
#ifndef DEADBAND_FILL_INL_H
#define DEADBAND_FILL_INL_H

#include <stdint.h>

#include "kernel_table.h"
#include "kernels.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// One row; returns how many entries it skips.
template <class T, bool Scaled, bool Centred>
int64_t fill_row(const T* x, int64_t in, float limit, const float* scale, const float* center, T* y, uint8_t* keep) {
  int32_t skipped = 0;  // an input has fewer than 2^31 entries
  for (int64_t i = 0; i < in; ++i) {
    float value = to_float(x[i]);
    if (Centred) value -= center[i];
    float score = __builtin_fabsf(value);
    if (Scaled) score *= scale[i];
    bool skip = score <= limit;
    T other = 0;
    if (Centred) store_one(&other, center[i]);
    y[i] = skip ? other : x[i];
    keep[i] = !skip;
    skipped += skip;
  }
  return skipped;
}

template <class T>
void fill_rows(const T* x, Range rows, int64_t x_stride, int64_t in, const deadband_layer& layer, T* y, uint8_t* keep) {
  constexpr decltype(&fill_row<T, false, false>) kFill[2][2] = {{fill_row<T, false, false>, fill_row<T, false, true>},
                                                                {fill_row<T, true, false>, fill_row<T, true, true>}};
  int64_t skipped = 0, nonfinite = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* row = x + r * x_stride;
    float limit = limit_of(layer, layer.relative ? norm_of(row, in) : 0.0f);
    skipped +=
        kFill[!!layer.scale][!!layer.center](row, in, limit, layer.scale, layer.center, y + r * in, keep + r * in);
    if (layer.counts) nonfinite += count_nonfinite(row, in);
  }
  if (!layer.counts) return;
  __atomic_fetch_add(&layer.counts[0], skipped, __ATOMIC_RELAXED);
  __atomic_fetch_add(&layer.counts[1], (rows.end - rows.begin) * in, __ATOMIC_RELAXED);
  __atomic_fetch_add(&layer.counts[2], nonfinite, __ATOMIC_RELAXED);
}

void fill(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer& layer, void* y,
          uint8_t* keep, int threads) {
  threads = threads_for(rows * in, kEntriesPerThread, threads);
  parallel(threads, [&](int part, int parts) {
    Range mine = share(rows, 1, part, parts);
    if (dtype == DEADBAND_FLOAT32)
      fill_rows((const float*)x, mine, x_stride, in, layer, (float*)y, keep);
    else
      fill_rows((const bf16*)x, mine, x_stride, in, layer, (bf16*)y, keep);
  });
}

}  // namespace
}  // namespace deadband

#endif
