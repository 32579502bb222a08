// y = x . W with W quantised to 8 or 4 bits and stored [in, out]. kernels.h says how.
//
// x comes as the integers of encode-inl.h, and the products are integer: four kept inputs at a time, whose bytes are
// interleaved in registers, so that any four can be neighbours and a skipped one costs nothing.
//
// Weights are fetched twice: the next chunk's to the second-level cache, and those three blocks ahead to the first.
// Measured on Emerald Rapids, sparsity 0.5, one thread, 2048 x 2048 to 14336 x 4096: only the next chunk's, to either
// cache, takes 5 to 25 % longer, most with short rows: in the first-level cache they evict each other before they are
// used. 64 or 128 bytes ahead instead of 192 take up to 4 % longer, 256 always 5 %. Fetching nothing takes 10 % longer
// with 8 bits and 60 % with 4; not fetching scales 2 to 8 %. With several rows of x the second fetch is worth 12 to
// 18 %.
//
// This is the way of one row of x: a chunk's weights pass once, from memory to registers. panels-inl.h has that of
// more.
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

constexpr int64_t kNear = 192;  // bytes that the nearer fetch is ahead
// Threads share out outputs if each then has so many bytes of every row of codes.
constexpr int64_t kShortRun = 4096;
constexpr int64_t kSumsTile = 8192;  // float32 sums of a tile of outputs: they stay in the first-level cache

// The vectors of columns that one vector of bytes holds: those of the bytes, or of the lower and the upper nibbles.
template <int Bits>
constexpr int kColumns = Bits == 8 ? 4 : 8;
template <int Bits>
constexpr int64_t kOutputs = kColumns<Bits> * kLanes;

// Where vector `v` of a block's columns, in order, has its outputs: bytes of nibbles hold b and 16 + b of 32.
template <int Bits>
DEADBAND_INLINE int64_t output_of(int v) {
  if (Bits == 8) return v * kLanes;
  int64_t byte = v % 4 * kLanes;
  return byte / 16 * 32 + byte % 16 + v / 4 * 16;
}

// Bytes of one block: whole, or those before the end of the codes. Those of the next row, which a short block at the
// end of a row meets, go to sums that nobody reads.
DEADBAND_INLINE Vb load_block(const uint8_t* p, const uint8_t* end) {
  if (p + kVectorBytes <= end) return load_bytes(p);
  uint8_t block[kVectorBytes] = {};
  if (p < end) memcpy(block, p, end - p);
  return load_bytes(block);
}
DEADBAND_INLINE Vf load_scales(const uint16_t* p, int64_t left) {
  if (left >= kLanes) return load_half(p);
  uint16_t part[kLanes] = {};
  if (left > 0) memcpy(part, p, left * sizeof *p);
  return load_half(part);
}

// The integer sums of a block, in interleave's order -> float32 sums, in the order of outputs.
// `left`: outputs of the matrix from the block's first on, all of the block's with Whole. scales, minimum: at the
// block's first output.
template <int Bits, bool Upper, bool Whole>
DEADBAND_INLINE void flush(Vi* totals, float step, int32_t sum, const uint16_t* scales, const uint16_t* minimum,
                           int64_t left, float* sums) {
  order_columns(totals);
  Vi zero = splat_int((Bits == 8 ? kCodeZero : minimum ? 0 : 8) * sum);
  Vf steps = splat(step), lowest = splat(step * (float)sum);
  for (int v = 0; v < 4; ++v) {
    int64_t o = output_of<Bits>(v + (Upper ? 4 : 0));
    Vf value = __builtin_convertvector(totals[v] - zero, Vf) * steps;
    if (scales) value *= Whole ? load_half(scales + o) : load_scales(scales + o, left - o);
    if (minimum) value += (Whole ? load_half(minimum + o) : load_scales(minimum + o, left - o)) * lowest;
    store(sums + o, load(sums + o) + value);
  }
}

// The upper nibbles' sums: those of whole bytes less those of the lower nibbles, where bytes count as unsigned.
#if defined(__ARM_FEATURE_DOTPROD)
DEADBAND_INLINE Vb upper_nibbles(Vb codes) { return codes >> 4; }
DEADBAND_INLINE Vi upper_total(Vi sum, Vi) { return sum; }
#else
DEADBAND_INLINE Vb upper_nibbles(Vb codes) { return codes; }
DEADBAND_INLINE Vi upper_total(Vi sum, Vi lower) { return (sum - lower) >> 4; }
#endif

// One row of x, outputs [begin, end): sums += the product with chunks [begin, end).
template <int Bits>
void stream_outputs(const Quantized& w, const Encoded& x, Range chunks, Range outputs, float* sums) {
  if (Bits == 8)
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
template <int Bits>
constexpr int64_t kOutputStep = kOutputs<Bits> > 128 ? kOutputs<Bits> : 128;

// Outputs that are summed at a time.
template <int Bits>
DEADBAND_INLINE int64_t output_tile(const Quantized& w) {
  return min_of(kSumsTile, round_up(w.out, kOutputStep<Bits>));
}

// Bytes that multiply_share takes.
template <int Bits>
DEADBAND_INLINE size_t multiply_bytes(const Quantized& w) {
  return output_tile<Bits>(w) * sizeof(float);
}

// One thread's share of one row's product where threads share out the outputs.
template <class T, int Bits>
void multiply_share(const Quantized& w, const Encoded& x, const Output<T>& target, int part, int parts, char* scratch) {
  Range mine = share(w.out, kOutputStep<Bits>, part, parts);
  int64_t tile = output_tile<Bits>(w);
  float* sums = (float*)scratch;
  for (int64_t o = mine.begin; o < mine.end; o += tile) {
    Range cut = {o, min_of(o + tile, mine.end)};
    memset(sums, 0, tile * sizeof(float));
    stream_outputs<Bits>(w, x, {0, x.chunks}, cut, sums);
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
