// y = x . W with W quantised to 8 or 4 bits and stored [in, out]. kernels.h says how.
//
// x comes as the integers of encode-inl.h, and the products are integer. This is the way of one row of x: a chunk's
// weights pass once, from memory to registers. panels-inl.h has that of more.
#ifndef DEADBAND_QUANTIZED_INL_H
#define DEADBAND_QUANTIZED_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes-inl.h"
#include "encode-inl.h"
#include "int4_row-inl.h"
#include "int8_row-inl.h"
#include "lines-inl.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Threads share out outputs if each then has so many bytes of every row of codes.
constexpr int64_t kShortRun = 4096;
constexpr int64_t kSumsTile = 8192;  // float32 sums of a tile of outputs: they stay in the first-level cache

// One row of x, outputs [begin, end): sums += the product with chunks [begin, end).
void stream_outputs(const Quantized& w, const Encoded& x, Range chunks, Range outputs, float* sums) {
  if (w.bits == 8)
    stream_lines<Int8Row>(w, x, chunks, outputs, sums);
  else if (w.minimum)
    stream_lines<Int4Row<true>>(w, x, chunks, outputs, sums);
  else
    stream_lines<Int4Row<false>>(w, x, chunks, outputs, sums);
}

// y = sums * the channels' scales + bias + offset.
template <class T>
void finish_outputs(const float* sums, const float* scales, const T* bias, const float* offset, int64_t count, T* y) {
  int64_t o = 0;
  for (; o + kLanes <= count; o += kLanes) {
    Vf value = load(sums + o);
    if (scales) value *= load(scales + o);
    if (bias) value += load_in_order(bias + o);
    if (offset) value += load(offset + o);
    store_in_order(y + o, value);
  }
  for (; o < count; ++o) {
    float value = sums[o];
    if (scales) value *= scales[o];
    if (bias) value += to_float(bias[o]);
    if (offset) value += offset[o];
    store_one(y + o, value);
  }
}

template <class T>
void finish_rows(const Quantized& w, const Output<T>& target, const float* sums, int64_t stride, int64_t rows,
                 Range outputs) {
  int64_t o = outputs.begin;
  for (int64_t r = 0; r < rows; ++r)
    finish_outputs(sums + r * stride, w.channel_scales ? w.channel_scales + o : nullptr,
                   target.bias ? target.bias + o : nullptr, target.offset ? target.offset + o : nullptr,
                   outputs.end - o, target.y + r * target.stride + o);
}

// A thread's share and a tile of outputs are whole numbers of these: their codes share no cache line then.
constexpr int64_t kOutputStep = 128;

// Outputs that are summed at a time.
DEADBAND_INLINE int64_t output_tile(const Quantized& w) { return min_of(kSumsTile, round_up(w.out, kOutputStep)); }

// Bytes that multiply_outputs takes.
DEADBAND_INLINE size_t multiply_bytes(const Quantized& w) { return output_tile(w) * sizeof(float); }

// One row's product, the outputs in `mine`: a thread's share where threads share out the outputs.
template <class T>
void multiply_outputs(const Quantized& w, const Encoded& x, const Output<T>& target, Range mine, char* scratch) {
  int64_t tile = output_tile(w);
  float* sums = (float*)scratch;
  for (int64_t o = mine.begin; o < mine.end; o += tile) {
    Range cut = {o, min_of(o + tile, mine.end)};
    memset(sums, 0, tile * sizeof(float));
    stream_outputs(w, x, {0, x.chunks}, cut, sums);
    finish_rows(w, target, sums, tile, 1, cut);
  }
}

// Whether threads share out the kept inputs instead, for one row of x and few outputs: runs of memory stay long. Then
// each has sums of its own, [threads][sums_stride], which are zero at first and added up in the end.
DEADBAND_INLINE bool by_inputs(const Quantized& w, int64_t rows, int threads) {
  return rows == 1 && threads > 1 && w.out <= kSumsTile && w.row_bytes < kShortRun * threads;
}
DEADBAND_INLINE int64_t sums_stride(const Quantized& w) { return round_up(w.out, 256); }

template <class T>
void add_up(const Quantized& w, const Output<T>& target, int threads, float* sums) {
  int64_t stride = sums_stride(w);
  for (int t = 1; t < threads; ++t)
    for (int64_t o = 0; o < w.out; ++o) sums[o] += sums[t * stride + o];
  finish_rows(w, target, sums, stride, 1, {0, w.out});
}

}  // namespace
}  // namespace deadband

#endif
