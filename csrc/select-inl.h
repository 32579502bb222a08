// What a layer reads and writes: the inputs of x that its rule keeps, and its outputs.
#ifndef DEADBAND_SELECT_INL_H
#define DEADBAND_SELECT_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "sizes-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// The kept inputs: which, and the `rows` values of each (less the center), zero for a row that skips it.
struct Kept {
  int32_t* index;
  float* value;
  int64_t count;
};

// select_inputs writes whole vectors.
DEADBAND_INLINE size_t kept_bytes(int64_t count, size_t bytes) { return round_up((count + kLanes) * bytes, 64); }

template <class T>
float norm_of(const T* x, int64_t in) {
  constexpr int kParts = 32;  // sums side by side: as many as there are lanes, so that the compiler uses them
  float part[kParts] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kParts <= in; i += kParts)
    for (int k = 0; k < kParts; ++k) {
      float value = to_float(x[i + k]);
      part[k] += value * value;
    }
  for (; i < in; ++i) {
    float value = to_float(x[i]);
    sum += value * value;
  }
  for (float each : part) sum += each;
  return __builtin_sqrtf(sum);
}

// NaN and infinity have the largest exponent. A pass of its own: it takes vectors, where the one that selects cannot.
DEADBAND_INLINE uint32_t is_nonfinite(const float* p) {
  uint32_t bits;
  memcpy(&bits, p, sizeof bits);
  return (bits & 0x7fffffffu) >= 0x7f800000u;
}
DEADBAND_INLINE uint32_t is_nonfinite(const bf16* p) { return (*p & 0x7fffu) >= 0x7f80u; }

template <class T>
int64_t count_nonfinite(const T* x, int64_t in) {
  uint32_t count = 0;  // an input has fewer than 2^31 entries
  for (int64_t i = 0; i < in; ++i) count += is_nonfinite(x + i);
  return count;
}

// The rows of x, and what is found once for all layers that read them.
template <class T>
struct Input {
  const T* x;
  int64_t rows, stride, in;
  float norm[DEADBAND_STREAM_ROWS];  // of each row, where a threshold is relative
  int64_t nonfinite;                 // where entries are counted
};

// What the scores of one row are compared with. Below every score if the row's norm is infinite or NaN.
DEADBAND_INLINE float limit_of(const deadband_layer& layer, float norm) {
  if (!layer.relative) return *layer.threshold;
  float limit = *layer.threshold * norm;
  return limit < __builtin_inff() ? limit : -1.0f;
}

template <class T, int R>
int64_t select_inputs(const Input<T>& input, const deadband_layer& layer, Kept* kept) {
  constexpr int64_t rows = R;
  const T* x = input.x;
  int64_t x_stride = input.stride, in = input.in, count = 0, skipped = 0;
  if (!layer.threshold) {
    for (int64_t i = 0; i < in; ++i) {
      kept->index[i] = (int32_t)i;
      for (int64_t r = 0; r < rows; ++r) kept->value[i * rows + r] = to_float(x[r * x_stride + i]);
    }
    kept->count = in;
    return 0;
  }
  float limit[R];
  for (int r = 0; r < R; ++r) limit[r] = limit_of(layer, input.norm[r]);
  const float *scale = layer.scale, *center = layer.center;
  int64_t i = 0;
  if constexpr (R == 1) {
    for (; i + kLanes <= in; i += kLanes) {
      Vf value = load_in_order(x + i);
      if (center) value -= load(center + i);
      Vf score = magnitude(value);
      if (scale) score *= load(scale + i);
      count += store_kept(kept->value + count, kept->index + count, value, ~(Vu)(score <= limit[0]), (int32_t)i);
    }
    skipped = i - count;
  }
  for (; i < in; ++i) {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      float value = to_float(x[r * x_stride + i]);
      if (center) value -= center[i];
      float score = __builtin_fabsf(value);
      if (scale) score *= scale[i];
      bool skip = score <= limit[r];
      kept->value[count * rows + r] = skip ? 0.0f : value;
      skipped += skip;
      any |= !skip;
    }
    kept->index[count] = (int32_t)i;
    count += any;
  }
  kept->count = count;
  return skipped;
}

template <class T>
constexpr decltype(&select_inputs<T, 1>) kSelect[] = {select_inputs<T, 1>, select_inputs<T, 2>, select_inputs<T, 3>,
                                                      select_inputs<T, 4>, select_inputs<T, 5>, select_inputs<T, 6>,
                                                      select_inputs<T, 7>, select_inputs<T, 8>};

template <class T>
struct Output {
  const T* bias;
  const float* offset;
  T* y;
  int64_t stride;
};

}  // namespace
}  // namespace deadband

#endif
