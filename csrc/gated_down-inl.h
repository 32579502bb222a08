// The second half of a gated MLP, where the gate is known: only the outputs of the up-projection that an open gate
// multiplies are computed, and only what they feed of the down-projection is read.
//
// The up-projection lies by output: the weights of one output side by side. Its entries are multiplied in float32.
#ifndef DEADBAND_GATED_DOWN_INL_H
#define DEADBAND_GATED_DOWN_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes-inl.h"
#include "kernel_table.h"
#include "kernels.h"
#include "linears-inl.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Outputs at a time: as many streams of weights from memory, and as many sums side by side.
constexpr int kOutputsAtOnce = 4;

// Rows of x in float32, with zeros up to a whole block: of plain weights in the order of load_pair.
struct WideRows {
  float* x;
  int64_t stride, in;
  float* group_sums;  // [rows][groups] of quantised weights
};

DEADBAND_INLINE Vf codes_at(const int8_t* p, int) {
  SignedCodes codes;
  memcpy(&codes, p, sizeof codes);
  return __builtin_convertvector(widen(codes), Vf);
}
DEADBAND_INLINE Vf codes_at(const uint8_t* p, int shift) {
  Codes codes;
  memcpy(&codes, p, sizeof codes);
  return __builtin_convertvector(widen(codes) >> shift & 15, Vf);
}

DEADBAND_INLINE float half_at(const uint16_t* p) {
#if defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*p)));
#else
  uint16_t lanes[kLanes] = {*p};
  return load_half(lanes)[0];
#endif
}

// Where the codes of an output lie, and how far they are shifted: with 4 bits, those of output o + 16 share its bytes.
template <class C>
DEADBAND_INLINE const C* codes_of(const deadband_layer& layer, int64_t in, int64_t output, int* shift) {
  const C* codes = (const C*)layer.weight;
  *shift = layer.bits == 4 ? (int)(output % 32 / 16) * 4 : 0;
  return codes + (layer.bits == 4 ? output / 32 * 16 + output % 16 : output) * in;
}

// The products of N outputs with R rows: result[N][R]. `next`: the outputs after these, whose codes are fetched.
template <class C, int R, int N>
DEADBAND_INLINE void dot_codes(const WideRows& x, const deadband_layer& layer, const int32_t* outputs,
                               const int32_t* next, float* result) {
  const C *codes[N], *ahead[N];
  int shift[N], other;
  for (int n = 0; n < N; ++n) {
    codes[n] = codes_of<C>(layer, x.in, outputs[n], shift + n);
    ahead[n] = codes_of<C>(layer, x.in, next[n], &other);
  }
  int64_t group = layer.group_size ? layer.group_size : max_of(x.in, 1), groups = (x.in + group - 1) / group;
  const uint16_t *scales = (const uint16_t*)layer.scales, *minimum = (const uint16_t*)layer.minimum;
  Vf total[N][R] = {};
  float rest[N][R] = {};
  for (int64_t g = 0; g < groups; ++g) {
    int64_t end = min_of(x.in, (g + 1) * group), i = g * group;
    Vf sums[N][R] = {};
    for (; i + kLanes <= end; i += kLanes) {
      for (int n = 0; n < N; ++n) {
        __builtin_prefetch(ahead[n] + i, 0, 2);
        Vf code = codes_at(codes[n] + i, shift[n]);
        for (int r = 0; r < R; ++r) sums[n][r] += code * load(x.x + r * x.stride + i);
      }
    }
    if (i < end)
      for (int n = 0; n < N; ++n) {
        C part[kLanes] = {};
        memcpy(part, codes[n] + i, end - i);
        Vf code = codes_at(part, shift[n]);  // beyond the last input x is zero, and so is what it gives
        for (int r = 0; r < R; ++r) sums[n][r] += code * load(x.x + r * x.stride + i);
      }
    for (int n = 0; n < N; ++n) {
      float scale =
          layer.group_size ? half_at(scales + outputs[n] * groups + g) : ((const float*)layer.scales)[outputs[n]];
      float low = minimum ? half_at(minimum + outputs[n] * groups + g) : layer.bits == 4 ? -8.0f * scale : 0.0f;
      for (int r = 0; r < R; ++r) {
        total[n][r] += sums[n][r] * scale;
        if (layer.bits == 4) rest[n][r] += low * x.group_sums[r * groups + g];
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) result[n * R + r] = sum_lanes(total[n][r]) + rest[n][r];
}

template <class T, int R, int N>
DEADBAND_INLINE void dot_weights(const WideRows& x, const deadband_layer& layer, const int32_t* outputs,
                                 const int32_t* next, float* result) {
  const T *weight[N], *ahead[N];
  for (int n = 0; n < N; ++n) {
    weight[n] = (const T*)layer.weight + outputs[n] * layer.weight_stride;
    ahead[n] = (const T*)layer.weight + next[n] * layer.weight_stride;
  }
  Pair sums[N][R] = {};
  auto step = [&](int n, Pair w, int64_t i) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      Pair xs = load_pair(x.x + r * x.stride + i);
      sums[n][r].a += w.a * xs.a;
      sums[n][r].b += w.b * xs.b;
    }
  };
  int64_t i = 0;
  for (; i + kBlock <= x.in; i += kBlock)
    for (int n = 0; n < N; ++n) {
      for (int64_t line = 0; line < kBlock; line += 64 / (int64_t)sizeof(T))
        __builtin_prefetch(ahead[n] + i + line, 0, 2);
      step(n, load_pair(weight[n] + i), i);
    }
  if (i < x.in)
    for (int n = 0; n < N; ++n) step(n, load_pair_part(weight[n] + i, x.in - i), i);
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) result[n * R + r] = sum_lanes(sums[n][r].a + sums[n][r].b);
}

template <class T, int R, int N>
DEADBAND_INLINE void dot_layer(const WideRows& x, const deadband_layer& layer, const int32_t* outputs,
                               const int32_t* next, float* result) {
  if (layer.bits == 8)
    dot_codes<int8_t, R, N>(x, layer, outputs, next, result);
  else if (layer.bits == 4)
    dot_codes<uint8_t, R, N>(x, layer, outputs, next, result);
  else
    dot_weights<T, R, N>(x, layer, outputs, next, result);
}

template <class T>
DEADBAND_INLINE float rounded_to(float value) {
  T rounded;
  store_one(&rounded, value);
  return to_float(rounded);
}

// h = gate * (W . x + bias) at the kept outputs in `mine`.
template <class T, int R>
void open_outputs(const WideRows& x, const deadband_layer& layer, const Kept& kept, Range mine, T* h) {
  const T* bias = (const T*)layer.bias;
  float result[kOutputsAtOnce * R];
  auto finish = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    for (int64_t n = 0; n < count; ++n)
      for (int r = 0; r < R; ++r) {
        int64_t o = kept.index[first + n];
        float gate = kept.value[(first + n) * R + r];
        float up = rounded_to<T>(result[n * R + r] + (bias ? to_float(bias[o]) : 0.0f));
        if (gate != 0.0f) store_one(h + r * layer.out + o, gate * up);  // a NaN differs from zero
      }
  };
  int64_t i = mine.begin;
  for (; i + kOutputsAtOnce <= mine.end; i += kOutputsAtOnce) {
    const int32_t* own = kept.index + i;
    dot_layer<T, R, kOutputsAtOnce>(x, layer, own, i + 2 * kOutputsAtOnce <= mine.end ? own + kOutputsAtOnce : own,
                                    result);
    finish(i, kOutputsAtOnce);
  }
  for (; i < mine.end; ++i) {
    dot_layer<T, R, 1>(x, layer, kept.index + i, kept.index + i, result);
    finish(i, 1);
  }
}

template <class T>
constexpr decltype(&open_outputs<T, 1>) kOpen[] = {open_outputs<T, 1>, open_outputs<T, 2>, open_outputs<T, 3>,
                                                   open_outputs<T, 4>, open_outputs<T, 5>, open_outputs<T, 6>,
                                                   open_outputs<T, 7>, open_outputs<T, 8>};

// x in float32. With plain weights a block is in the order of load_pair, as the weights are.
template <class T>
void widen(const T* x, int64_t rows, int64_t x_stride, const deadband_layer& layer, const WideRows& to) {
  int64_t group = layer.group_size ? layer.group_size : max_of(to.in, 1), groups = (to.in + group - 1) / group;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * x_stride;
    float* own = to.x + r * to.stride;
    if (!layer.bits) {
      for (int64_t i = 0; i < to.in; i += kBlock)
        store_pair(own + i, i + kBlock <= to.in ? load_pair(from + i) : load_pair_part(from + i, to.in - i));
      continue;
    }
    for (int64_t i = 0; i < to.stride; ++i) own[i] = i < to.in ? to_float(from[i]) : 0.0f;
    for (int64_t g = 0; g < groups; ++g) {
      float sum = 0;
      for (int64_t i = g * group; i < min_of(to.in, (g + 1) * group); ++i) sum += own[i];
      to.group_sums[r * groups + g] = sum;
    }
  }
}

// y = gate * (W . x + bias), where nothing is read for what all rows skip; with gate NULL, the product alone.
template <class T>
int gated_outputs(const T* x, int64_t rows, int64_t x_stride, int64_t in, const T* gate, const deadband_layer& layer,
                  T* y, int threads) {
  int64_t out = layer.out, stride = round_up(in, kBlock) + kBlock;
  int64_t groups = layer.group_size ? (in + layer.group_size - 1) / layer.group_size : 1;
  size_t index_bytes = kept_bytes(out, sizeof(int32_t)), value_bytes = kept_bytes(out * rows, sizeof(float));
  size_t x_bytes = round_up(rows * stride * sizeof(float), 64);
  char* memory = (char*)workspace(kSharedSlot, index_bytes + value_bytes + x_bytes + rows * groups * sizeof(float));
  if (!memory) return DEADBAND_NO_MEMORY;
  Kept kept = {(int32_t*)memory, (float*)(memory + index_bytes), 0};
  float* wide = (float*)(memory + index_bytes + value_bytes);
  WideRows from = {wide, stride, in, (float*)((char*)wide + x_bytes)};
  if (gate) {
    Input<T> input = input_of(gate, rows, out, out, &layer, 1);
    int64_t skipped = kSelect<T>[rows - 1](input, layer, & kept);
    if (layer.threshold && layer.counts) add_counts(input, skipped, layer.counts);
  } else {
    for (int64_t o = 0; o < out; ++o) kept.index[o] = (int32_t)o;
    for (int64_t i = 0; i < out * rows; ++i) kept.value[i] = 1.0f;
    kept.count = out;
  }
  widen(x, rows, x_stride, layer, from);
  memset(y, 0, rows * out * sizeof(T));
  int64_t bytes = layer.bits ? in : in * (int64_t)sizeof(T);
  parallel(threads_for(kept.count * bytes, kBytesPerThread, threads),
           [&](int part, int parts) { kOpen<T>[rows - 1](from, layer, kept, share(kept.count, 1, part, parts), y); });
  return 0;
}

template <class T>
int gated_down_typed(const T* x, int64_t rows, int64_t x_stride, int64_t in, const T* gate,
                     const deadband_layer* layers, int count, T* y, int threads) {
  if (count == 1) return gated_outputs(x, rows, x_stride, in, gate, layers[0], y, threads);
  int64_t inner = layers[0].out;
  T* h = (T*)workspace(kProductSlot, rows * inner * sizeof(T));
  if (!h) return DEADBAND_NO_MEMORY;
  if (int error = gated_outputs(x, rows, x_stride, in, gate, layers[0], h, threads)) return error;
  return linears_typed(h, rows, inner, inner, layers + 1, 1, y, threads);
}

int gated_down(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* gate,
               const deadband_layer* layers, int count, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return gated_down_typed((const float*)x, rows, x_stride, in, (const float*)gate, layers, count, (float*)y, threads);
  return gated_down_typed((const bf16*)x, rows, x_stride, in, (const bf16*)gate, layers, count, (bf16*)y, threads);
}

}  // namespace
}  // namespace deadband

#endif
