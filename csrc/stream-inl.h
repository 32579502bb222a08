// y = x . W with W stored [in, out], 1 to 8 rows of x: the weights of the kept inputs stream by once.
#ifndef DEADBAND_STREAM_INL_H
#define DEADBAND_STREAM_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "select-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Reading is the limit: from memory this takes 80 to 90 % of the bandwidth that plain reading reaches. Measured on
// Emerald Rapids, one row, bfloat16 4096 x 4096, sparsity 0.5. Nothing to gain (within 2 %): eight inputs per pass,
// tiles of twice or four times the size, fetching two or four passes ahead, twice as long runs of outputs for each
// thread (so sharing out the inputs instead would not pay). Slower: not fetching ahead 18 %, tiles of 2048 outputs 3 %,
// fetching to the first-level cache instead of the second 3 %. Huge pages behind the weights gain 3 to 5 %.

// Outputs whose sums stay in the first-level cache while the weights pass (32 KB of it, for all rows together).
constexpr int64_t kTile = 8192;
// Weight rows that are added in one pass over the sums.
constexpr int kDepth = 4;
// Inputs added up before the sums go to the totals: a long chain loses accuracy with its length. No measurable time.
constexpr int64_t kChain = 64;

// sums[r] += the weights of K inputs times their values, over one tile. `ahead`: weights to fetch meanwhile.
template <class T, int R, int K>
DEADBAND_INLINE void add_inputs(const T* const* weight, const float* value, const T* const* ahead, int64_t width,
                                float* sums, int64_t sums_stride) {
  Vf x[K][R];
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) x[k][r] = splat(value[k * R + r]);
  auto step = [&](const Pair* w, int64_t j) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      Pair product = {w[0].a * x[0][r], w[0].b * x[0][r]};
      for (int k = 1; k < K; ++k) {
        product.a += w[k].a * x[k][r];
        product.b += w[k].b * x[k][r];
      }
      float* p = sums + r * sums_stride + j;
      store(p, load(p) + product.a);
      store(p + kLanes, load(p + kLanes) + product.b);
    }
  };
  Pair w[K];
  int64_t j = 0;
  for (; j + kBlock <= width; j += kBlock) {
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 2
      for (int64_t line = 0; line < kBlock; line += 64 / (int64_t)sizeof(T))
        __builtin_prefetch(ahead[k] + j + line, 0, 2);
      w[k] = load_pair(weight[k] + j);
    }
    step(w, j);
  }
  if (j < width) {
    for (int k = 0; k < K; ++k) w[k] = load_pair_part(weight[k] + j, width - j);
    step(w, j);
  }
}

// `count` float32 entries in the order that a pair of the other argument's type has.
DEADBAND_INLINE Pair load_offset(const float*, const float* p, int64_t count) { return load_pair_part(p, count); }
DEADBAND_INLINE Pair load_offset(const bf16*, const float* p, int64_t count) {
  float block[kBlock] = {}, even[kLanes], odd[kLanes];
  memcpy(block, p, count * sizeof(float));
  for (int lane = 0; lane < kLanes; ++lane) {
    even[lane] = block[2 * lane];
    odd[lane] = block[2 * lane + 1];
  }
  return {load(even), load(odd)};
}

// One tile of outputs: weight, bias and y point at its first one. sums, totals: [R][stride], stride >= the width in
// blocks.
template <class T, int R>
void stream_tile(const Kept& kept, const T* weight, int64_t weight_stride, int64_t width, const T* bias,
                 const float* offset, T* y, int64_t y_stride, float* sums, float* totals, int64_t stride) {
  for (int64_t j = 0; j < width; j += kBlock) {
    Pair start = {};
    if (bias) start = j + kBlock <= width ? load_pair(bias + j) : load_pair_part(bias + j, width - j);
    if (offset) {
      Pair more = load_offset(y, offset + j, min_of(kBlock, width - j));
      start = {start.a + more.a, start.b + more.b};
    }
    for (int r = 0; r < R; ++r) {
      store_pair(totals + r * stride + j, start);
      store_pair(sums + r * stride + j, Pair{});
    }
  }
  const T* row[kDepth];
  const T* ahead[kDepth];
  for (int64_t chain = 0; chain < kept.count; chain += kChain) {
    int64_t i = chain, end = min_of(kept.count, chain + kChain);
    for (; i + kDepth <= end; i += kDepth) {
      for (int k = 0; k < kDepth; ++k) {
        row[k] = weight + kept.index[i + k] * weight_stride;
        ahead[k] = weight + kept.index[min_of(i + kDepth + k, kept.count - 1)] * weight_stride;
      }
      add_inputs<T, R, kDepth>(row, kept.value + i * R, ahead, width, sums, stride);
    }
    for (; i < end; ++i) {
      row[0] = weight + kept.index[i] * weight_stride;
      add_inputs<T, R, 1>(row, kept.value + i * R, row, width, sums, stride);
    }
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < width; j += kBlock) {
        float *sum = sums + r * stride + j, *total = totals + r * stride + j;
        Pair s = load_pair(sum), t = load_pair(total);
        store_pair(total, Pair{t.a + s.a, t.b + s.b});
        store_pair(sum, Pair{});
      }
  }
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < width; j += kBlock) {
      Pair t = load_pair(totals + r * stride + j);
      if (j + kBlock <= width)
        store_pair(y + r * y_stride + j, t);
      else
        store_pair_part(y + r * y_stride + j, t, width - j);
    }
}

// Bytes of sums that stream_range takes for so many outputs.
DEADBAND_INLINE size_t stream_bytes(int64_t rows, int64_t count) {
  return 2 * rows * min_of(kTile / rows, round_up(count, kBlock)) * sizeof(float);
}

// The outputs in `mine` of the product.
template <class T, int R>
void stream_range(const Kept& kept, const T* weight, int64_t weight_stride, const Output<T>& target, Range mine,
                  float* sums) {
  int64_t count = mine.end - mine.begin, tile = kTile / R, tiles = (count + tile - 1) / tile;
  int64_t stride = min_of(tile, round_up(count, kBlock));
  for (int64_t t = 0; t < tiles; ++t) {
    Range cut = share(count, kBlock, (int)t, (int)tiles);
    int64_t first = mine.begin + cut.begin;
    stream_tile<T, R>(kept, weight + first, weight_stride, cut.end - cut.begin,
                      target.bias ? target.bias + first : nullptr, target.offset ? target.offset + first : nullptr,
                      target.y + first, target.stride, sums, sums + R * stride, stride);
  }
}

template <class T>
constexpr decltype(&stream_range<T, 1>) kStream[] = {stream_range<T, 1>, stream_range<T, 2>, stream_range<T, 3>,
                                                     stream_range<T, 4>, stream_range<T, 5>, stream_range<T, 6>,
                                                     stream_range<T, 7>, stream_range<T, 8>};

}  // namespace
}  // namespace deadband

#endif
