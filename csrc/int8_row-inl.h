// One row of x and weights of 8 bits: integer products of four kept inputs at a time, whose bytes are interleaved in
// registers, so that any four can be neighbours and a skipped one costs nothing.
#ifndef DEADBAND_INT8_ROW_INL_H
#define DEADBAND_INT8_ROW_INL_H

#include <stdint.h>

#include "bytes-inl.h"
#include "encode-inl.h"
#include "lines-inl.h"
#include "sizes-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Vectors of a row that meet x in one visit, as many as have registers for their sums. If it were less than a line with
// AVX2, rows at a distance of 4 KB would have pushed it out of the first-level cache before the next visit.
constexpr int kVectorsOfVisit = kVectorBytes == 32 && kParts == 1 ? 2 : 1;

// Integer sums of a vector's columns, in interleave's order -> float32 sums, in the order of outputs.
DEADBAND_INLINE void flush_columns(Vi* totals, float step, int32_t sum, const uint16_t* scales, float* sums) {
  order_columns(totals);
  Vi zero = splat_int(kCodeZero * sum);
  Vf steps = splat(step);
  for (int64_t v = 0; v < 4; ++v, sums += kLanes) {
    Vf value = __builtin_convertvector(totals[v] - zero, Vf) * steps;
    store(sums, scales ? load(sums) + value * load_half(scales + v * kLanes) : load(sums) + value);
  }
}

struct Int8Row {
  static constexpr int kBits = 8;

  template <bool Whole>
  static DEADBAND_INLINE void add_line(const Encoded& x, int64_t c, int64_t byte, const uint8_t* end, Ahead ahead,
                                       const uint16_t* scales, const uint16_t*, float* sums) {
    const Chunk& chunk = x.chunk[c];
    uint8_t parts[4][kLine];
    for (int64_t begin = 0; begin < kLine; begin += kVectorsOfVisit * kVectorBytes) {
      const uint8_t* const* codes = x.codes + 4 * chunk.first;
      const int32_t* words = x.words + 2 * chunk.first;
      Vi columns[kVectorsOfVisit][4][kParts] = {};
      for (int64_t q = 0; q < chunk.quads; ++q, codes += 4, ++words) {
        const uint8_t* lines[4];
        for (int k = 0; k < 4; ++k) {
          if (begin == 0) {
            __builtin_prefetch(ahead.codes[4 * q + k] + ahead.byte, 0, 2);
            __builtin_prefetch(ahead.next[4 * q + k] + byte, 0, 2);
          }
          lines[k] = line_at<Whole>(codes[k] + byte, end, parts[k]) + begin;
        }
        for (int v = 0; v < kVectorsOfVisit; ++v) {
          Vb rows[4], bytes[4];
          for (int k = 0; k < 4; ++k) rows[k] = load_bytes(lines[k] + v * kVectorBytes);
          interleave(rows, bytes);
          for (int k = 0; k < 4; ++k) multiply_add(columns[v][k], from_signed(bytes[k]), words, chunk.quads);
        }
      }
      for (int v = 0; v < kVectorsOfVisit; ++v) {
        Vi totals[4];
        for (int k = 0; k < 4; ++k) totals[k] = total(columns[v][k]);
        int64_t o = begin + v * kVectorBytes;
        flush_columns(totals, x.step[c], x.sum[c], scales ? scales + o : nullptr, sums + o);
      }
    }
  }
};

}  // namespace
}  // namespace deadband

#endif
