// y = x . W with W stored [in, out] and many rows of x (prefill): a blocked product with packed operands.
//
// The operands are packed in steps of one 32-bit lane: one float32 input, or two bfloat16 inputs side by side where
// this instruction set multiplies such pairs. Elsewhere bfloat16 becomes float32 in packing. That can be the faster
// way: on Emerald Rapids vdpbf16ps starts every other cycle but float32 multiply-adds twice a cycle, and 256 tokens
// take half the time that they take with vdpbf16ps. cpu.cpp knows which CPUs it suits.
#ifndef DEADBAND_GEMM_INL_H
#define DEADBAND_GEMM_INL_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel_table.h"
#include "kernels.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Rows of x whose sums fit the registers, next to a block of weights: with 2 vectors a row, 28 of AVX-512's 32.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__aarch64__)
constexpr int kTileRows = 12;
#elif defined(__AVX__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
// Weights packed at a time: 256 KB of lanes, for the second-level cache. From there a block's column goes to the first
// level.
constexpr int64_t kPanelSteps = 256, kPanelOutputs = 256;
// Rows of x that meet a panel before it is packed anew; their sums take 512 KB.
constexpr int64_t kPanelRows = 512;
// Steps that are added in one chain. 64 cost 4 % of time against 256 and halve the rounding error, which is then 0.5 to
// 1.6 times that of torch's float32 product instead of 0.8 to 3.2 times.
constexpr int64_t kChainSteps = 64;

// What a step of T is: how many inputs, and how weights and x are packed and multiplied.
template <class T>
struct Step {
  static constexpr int kInputs = 1;
  static DEADBAND_INLINE Pair weights(const Pair* inputs) { return inputs[0]; }
  static DEADBAND_INLINE float entry(const T* x, int64_t) { return to_float(x[0]); }
  static DEADBAND_INLINE void multiply(Pair& sum, Pair w, float x) {
    sum.a += w.a * x;
    sum.b += w.b * x;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  static constexpr int kInputs = 2;
  static DEADBAND_INLINE Pair weights(const Pair* inputs) {  // the values are bfloat16: their lower halves are zero
    return {(Vf)((Vu)inputs[0].a >> 16 | (Vu)inputs[1].a), (Vf)((Vu)inputs[0].b >> 16 | (Vu)inputs[1].b)};
  }
  static DEADBAND_INLINE float entry(const bf16* x, int64_t count) {
    uint32_t bits = x[0] | (count > 1 ? (uint32_t)x[1] << 16 : 0);
    float lane;
    memcpy(&lane, &bits, sizeof lane);
    return lane;
  }
  static DEADBAND_INLINE void multiply(Pair& sum, Pair w, float x) {
    int32_t lane;
    memcpy(&lane, &x, sizeof lane);
    __m512bh xs = (__m512bh)_mm512_set1_epi32(lane);
    sum.a = (Vf)_mm512_dpbf16_ps((__m512)sum.a, (__m512bh)w.a, xs);
    sum.b = (Vf)_mm512_dpbf16_ps((__m512)sum.b, (__m512bh)w.b, xs);
  }
};
#endif

// Where a tile's sums go: to `sums` until the last chain, then to y.
template <class T>
struct Target {
  float* sums;  // [rows of the tile][kPanelOutputs], in the order of load_pair
  T* y;
  int64_t y_stride, width;  // width: outputs in this block
  const T* bias;
  bool first, last;
};

// M rows of x by one block of outputs. x: [steps][M], weight: [steps][kBlock], both packed.
template <class T, int M>
void multiply_tile(const float* x, const float* weight, int64_t steps, const Target<T>& target) {
  Pair sums[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sums[m] = Pair{};
  for (int64_t s = 0; s < steps; ++s) {
    Pair w = load_pair(weight + s * kBlock);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) Step<T>::multiply(sums[m], w, x[s * M + m]);
  }
  Pair bias = {};
  if (target.last && target.bias)
    bias = target.width == kBlock ? load_pair(target.bias) : load_pair_part(target.bias, target.width);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    float* partial = target.sums + m * kPanelOutputs;
    Pair sum = sums[m];
    if (!target.first) {
      Pair before = load_pair(partial);
      sum = {before.a + sum.a, before.b + sum.b};
    }
    if (!target.last) {
      store_pair(partial, sum);
      continue;
    }
    sum = {sum.a + bias.a, sum.b + bias.b};
    T* y = target.y + m * target.y_stride;
    if (target.width == kBlock)
      store_pair(y, sum);
    else
      store_pair_part(y, sum, target.width);
  }
}

template <class T, int M = kTileRows>
void multiply_rows(int64_t rows, const float* x, const float* weight, int64_t steps, const Target<T>& target) {
  if constexpr (M > 1)
    if (rows < M) return multiply_rows<T, M - 1>(rows, x, weight, steps, target);
  multiply_tile<T, M>(x, weight, steps, target);
}

// To [block of outputs][steps][kBlock], with zeros beyond the last input and output. Four steps side by side, the next
// four fetched meanwhile: one at a time, unfetched, took 15 % longer at 5 rows. Fetching the next panel during the
// multiplication instead took 20 % longer with bfloat16: the product waits for the memory then.
template <class T>
void pack_panel(const T* weight, int64_t weight_stride, int64_t inputs, int64_t outputs, float* packed) {
  constexpr int kInputs = Step<T>::kInputs, kGroup = 4 * kInputs;
  int64_t steps = (inputs + kInputs - 1) / kInputs;
  for (int64_t i = 0; i < inputs; i += kGroup) {
    int64_t group = min_of(kGroup, inputs - i);
    const T* ahead = weight + min_of(i + kGroup, inputs - group) * weight_stride;
    float* to = packed + i / kInputs * kBlock;
    for (int64_t o = 0; o < outputs; o += kBlock, to += steps * kBlock) {
      Pair w[kGroup];
      for (int k = 0; k < kGroup; ++k) {
        const T* p = weight + (i + k) * weight_stride + o;
        if (k >= group)
          w[k] = Pair{};
        else if (o + kBlock > outputs)
          w[k] = load_pair_part(p, outputs - o);
        else {
          __builtin_prefetch(ahead + k * weight_stride + o, 0, 2);
          if (kBlock * sizeof(T) > 64) __builtin_prefetch(ahead + k * weight_stride + o + kLanes, 0, 2);
          w[k] = load_pair(p);
        }
      }
      for (int k = 0; k < group; k += kInputs) store_pair(to + k / kInputs * kBlock, Step<T>::weights(w + k));
    }
  }
}

// Tiles of rows differ by one row at most: 16 rows are 8 and 8, not 14 and 2.
DEADBAND_INLINE Range tile_rows(int64_t rows, int64_t tile) {
  return share(rows, 1, (int)tile, (int)((rows + kTileRows - 1) / kTileRows));
}

// To [panel][tile of rows][steps][rows of the tile].
template <class T>
void pack_rows(const T* x, int64_t rows, int64_t x_stride, int64_t in, Range steps, float* packed) {
  constexpr int kInputs = Step<T>::kInputs;
  int64_t all = (in + kInputs - 1) / kInputs;
  for (int64_t first = steps.begin; first < steps.end; first += kPanelSteps) {
    int64_t depth = min_of(kPanelSteps, all - first);
    for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
      Range mine = tile_rows(rows, tile);
      int64_t count = mine.end - mine.begin;
      float* to = packed + first * rows + mine.begin * depth;
      // A few steps of a row at a time: with a stride of a power of two, one step of every row would share a cache set.
      for (int64_t begin = 0; begin < depth; begin += 32)
        for (int64_t r = 0; r < count; ++r)
          for (int64_t s = begin; s < min_of(begin + 32, depth); ++s) {
            int64_t i = (first + s) * kInputs;
            to[s * count + r] = Step<T>::entry(x + (mine.begin + r) * x_stride + i, in - i);
          }
    }
  }
}

template <class T>
void multiply_panels(const float* x, int64_t rows, int64_t in, const T* weight, int64_t weight_stride, Range outputs,
                     const T* bias, T* y, int64_t y_stride, float* packed, float* sums) {
  constexpr int kInputs = Step<T>::kInputs;
  int64_t steps = (in + kInputs - 1) / kInputs;
  for (int64_t o = outputs.begin; o < outputs.end; o += kPanelOutputs) {
    int64_t width = min_of(kPanelOutputs, outputs.end - o);
    int64_t first = 0;
    do {  // once even without inputs: y is the bias then
      int64_t depth = min_of(kPanelSteps, steps - first);
      pack_panel(weight + first * kInputs * weight_stride + o, weight_stride,
                 min_of(depth * kInputs, in - first * kInputs), width, packed);
      for (int64_t block = 0; block < width; block += kBlock) {
        int64_t s = 0;
        do {
          int64_t chain = min_of(kChainSteps, depth - s);
          for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
            Range mine = tile_rows(rows, tile);
            int64_t count = mine.end - mine.begin;
            Target<T> target = {sums + mine.begin * kPanelOutputs + block,
                                y + mine.begin * y_stride + o + block,
                                y_stride,
                                min_of(kBlock, width - block),
                                bias ? bias + o + block : nullptr,
                                first + s == 0,
                                first + s + chain == steps};
            multiply_rows<T>(count, x + first * rows + mine.begin * depth + s * count,
                             packed + block * depth + s * kBlock, chain, target);
          }
          s += chain;
        } while (s < depth);
      }
      first += depth;
    } while (first < steps);
  }
}

template <class T>
int gemm_typed(const T* x, int64_t rows, int64_t x_stride, int64_t in, const T* weight, int64_t weight_stride,
               int64_t out, const T* bias, T* y, int threads) {
  int64_t steps = (in + Step<T>::kInputs - 1) / Step<T>::kInputs;
  float* packed_x = (float*)workspace(kSharedSlot, min_of(rows, kPanelRows) * steps * sizeof(float));
  if (!packed_x) return DEADBAND_NO_MEMORY;
  threads = threads_for(rows * in * out, kOperationsPerThread, threads);
  int error = 0;
  for (int64_t r = 0; r < rows; r += kPanelRows) {
    int64_t count = min_of(kPanelRows, rows - r);
    parallel(threads, [&](int part, int parts) {
      pack_rows(x + r * x_stride, count, x_stride, in, share(steps, kPanelSteps, part, parts), packed_x);
    });
    parallel(threads, [&](int part, int parts) {
      float* own = (float*)workspace(kPrivateSlot, kPanelOutputs * (kPanelSteps + count) * sizeof(float));
      if (own)
        multiply_panels(packed_x, count, in, weight, weight_stride, share(out, kBlock, part, parts), bias, y + r * out,
                        out, own, own + kPanelOutputs * kPanelSteps);
      else
        __atomic_store_n(&error, (int)DEADBAND_NO_MEMORY, __ATOMIC_RELAXED);
    });
  }
  return error;
}

int gemm(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
         int64_t weight_stride, int64_t out, const void* bias, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return gemm_typed((const float*)x, rows, x_stride, in, (const float*)weight, weight_stride, out, (const float*)bias,
                      (float*)y, threads);
  return gemm_typed((const bf16*)x, rows, x_stride, in, (const bf16*)weight, weight_stride, out, (const bf16*)bias,
                    (bf16*)y, threads);
}

}  // namespace
}  // namespace deadband

#endif
