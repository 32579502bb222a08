// Statistics of a site's input.
#ifndef DEADBAND_OBSERVE_INL_H
#define DEADBAND_OBSERVE_INL_H

#include <stdint.h>
#include <string.h>

#include "kernel_table.h"
#include "kernels.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

constexpr int64_t kBins = 32768;

struct float16 {
  uint16_t bits;
};
// The exponent's bias differs by 112: a multiplication moves it and makes float16's subnormals normal. Infinity and NaN
// have the largest exponent in both.
DEADBAND_INLINE float to_float(float16 value) {
  uint32_t bits = (uint32_t)(value.bits & 0x7fff) << 13;
  float f;
  memcpy(&f, &bits, sizeof f);
  f *= 0x1p112f;
  memcpy(&bits, &f, sizeof bits);
  if ((value.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
  bits |= (uint32_t)(value.bits & 0x8000) << 16;
  memcpy(&f, &bits, sizeof f);
  return f;
}

template <class T>
void observe_columns(const T* x, int64_t rows, int64_t x_stride, Range columns, const float* scale, int64_t* histogram,
                     double* sum, double* sum_of_squares) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * x_stride;
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      float value = to_float(row[c]);
      float finite = __builtin_fabsf(value) <= 3.40282347e38f ? value : 0.0f;
      sum[c] += (double)finite;
      sum_of_squares[c] += (double)finite * (double)finite;
    }
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      float score = to_float(row[c]);
      if (scale) score *= scale[c];
      uint32_t bits;
      memcpy(&bits, &score, sizeof bits);
      ++histogram[(bits & 0x7fffffffu) >> 16];
    }
  }
}

template <class T>
int observe_typed(const T* x, int64_t rows, int64_t x_stride, int64_t cols, const float* scale, int64_t* histogram,
                  double* sum, double* sum_of_squares, int threads) {
  // Threads share out the columns, so that every sum runs in the order of the rows, whatever their number.
  threads = threads_for(rows * cols, kEntriesPerThread, threads_for(cols, 64, threads));
  int64_t* others = nullptr;
  if (threads > 1) {
    others = (int64_t*)workspace(kSharedSlot, (threads - 1) * kBins * sizeof(int64_t));
    if (!others) return DEADBAND_NO_MEMORY;
    memset(others, 0, (threads - 1) * kBins * sizeof(int64_t));
  }
  parallel(threads, [&](int part, int parts) {
    observe_columns(x, rows, x_stride, share(cols, 16, part, parts), scale,
                    part ? others + (part - 1) * kBins : histogram, sum, sum_of_squares);
  });
  for (int t = 0; t < threads - 1; ++t)
    for (int64_t b = 0; b < kBins; ++b) histogram[b] += others[t * kBins + b];
  return 0;
}

int observe(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t cols, const float* scale,
            int64_t* histogram, double* sum, double* sum_of_squares, int threads) {
  switch (dtype) {
    case DEADBAND_FLOAT32:
      return observe_typed((const float*)x, rows, x_stride, cols, scale, histogram, sum, sum_of_squares, threads);
    case DEADBAND_BFLOAT16:
      return observe_typed((const bf16*)x, rows, x_stride, cols, scale, histogram, sum, sum_of_squares, threads);
    default:
      return observe_typed((const float16*)x, rows, x_stride, cols, scale, histogram, sum, sum_of_squares, threads);
  }
}

}  // namespace
}  // namespace deadband

#endif
