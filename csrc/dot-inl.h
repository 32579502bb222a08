// y = x . W with W stored [out, in], the usual layout, 1 to 4 rows of x: one dot product per output.
#ifndef DEADBAND_DOT_INL_H
#define DEADBAND_DOT_INL_H

#include <stdint.h>

#include "kernel_table.h"
#include "kernels.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Outputs at a time: as many streams of weights from memory.
constexpr int kDots = 4;
// Entries that weights are fetched ahead, a kilobyte of bfloat16: 11 to 14 GB/s with long rows, 6 to 13 with 576
// inputs, half of that distance 13 % less. float32 passes fast enough for the hardware's own prefetching.
constexpr int64_t kAhead = 512;

// The dot products of N consecutive outputs with R rows. x: [R][stride] float32 in the order of load_pair, with zeros
// up to a whole block.
template <class T, int R, int N>
DEADBAND_INLINE void dot_outputs(const float* x, int64_t stride, int64_t in, const T* weight, int64_t weight_stride,
                                 float* result /* [N][R] */) {
  Pair sums[N][R] = {};
  auto step = [&](const Pair* w, int64_t i) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      Pair xs = load_pair(x + r * stride + i);
      for (int n = 0; n < N; ++n) {
        sums[n][r].a += w[n].a * xs.a;
        sums[n][r].b += w[n].b * xs.b;
      }
    }
  };
  Pair w[N];
  int64_t i = 0;
  for (; i + kBlock <= in; i += kBlock) {
    const T* ahead = weight + i + kAhead;
    if (i + kAhead >= in) ahead += N * weight_stride - in;  // in the next outputs' weights
    for (int n = 0; n < N; ++n) {
      if (sizeof(T) == 2) __builtin_prefetch(ahead + n * weight_stride, 0, 3);
      w[n] = load_pair(weight + n * weight_stride + i);
    }
    step(w, i);
  }
  if (i < in) {
    for (int n = 0; n < N; ++n) w[n] = load_pair_part(weight + n * weight_stride + i, in - i);
    step(w, i);
  }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) result[n * R + r] = sum_lanes(sums[n][r].a + sums[n][r].b);
}

template <class T, int R>
int dot_rows(const T* x, int64_t x_stride, int64_t in, const T* weight, int64_t weight_stride, int64_t out,
             const T* bias, T* y, int threads) {
  int64_t stride = round_up(in, kBlock);
  float* xs = (float*)workspace(kSharedSlot, R * stride * sizeof(float));
  if (!xs) return DEADBAND_NO_MEMORY;
  for (int r = 0; r < R; ++r)
    for (int64_t i = 0; i < in; i += kBlock) {
      const T* p = x + r * x_stride + i;
      store_pair(xs + r * stride + i, i + kBlock <= in ? load_pair(p) : load_pair_part(p, in - i));
    }
  threads = threads_for(in * out * (int64_t)sizeof(T), kBytesPerThread, threads);
  parallel(threads, [&](int part, int parts) {
    Range mine = share(out, 16, part, parts);
    float result[kDots * R];
    auto finish = [&](int64_t first, int64_t count) {
      for (int64_t n = 0; n < count; ++n)
        for (int r = 0; r < R; ++r)
          store_one(y + r * out + first + n, result[n * R + r] + (bias ? to_float(bias[first + n]) : 0.0f));
    };
    int64_t o = mine.begin;
    for (; o + kDots <= mine.end; o += kDots) {
      dot_outputs<T, R, kDots>(xs, stride, in, weight + o * weight_stride, weight_stride, result);
      finish(o, kDots);
    }
    for (; o < mine.end; ++o) {
      dot_outputs<T, R, 1>(xs, stride, in, weight + o * weight_stride, weight_stride, result);
      finish(o, 1);
    }
  });
  return 0;
}

template <class T>
int dot_typed(const T* x, int64_t rows, int64_t x_stride, int64_t in, const T* weight, int64_t weight_stride,
              int64_t out, const T* bias, T* y, int threads) {
  constexpr decltype(&dot_rows<T, 1>) kByRows[] = {dot_rows<T, 1>, dot_rows<T, 2>, dot_rows<T, 3>, dot_rows<T, 4>};
  return kByRows[rows - 1](x, x_stride, in, weight, weight_stride, out, bias, y, threads);
}

int dot(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight, int64_t weight_stride,
        int64_t out, const void* bias, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return dot_typed((const float*)x, rows, x_stride, in, (const float*)weight, weight_stride, out, (const float*)bias,
                     (float*)y, threads);
  return dot_typed((const bf16*)x, rows, x_stride, in, (const bf16*)weight, weight_stride, out, (const bf16*)bias,
                   (bf16*)y, threads);
}

}  // namespace
}  // namespace deadband

#endif
