// One row of x and weights of 4 bits: sums of 16 bits over a chunk, which is scaled once.
//
// A visit takes 64 bytes of two rows of codes, 128 outputs. With AVX2 the rows' bytes are interleaved and multiplied as
// pairs. That takes 16 instructions for 64 bytes: few enough that memory is what they wait for, also with vectors of
// 256 bits where there are longer ones. The sums may wrap. They start at -8 times the sum of x, so that the total is
// that of (q - 8) x, which encode_nibbles keeps within 16 bits. On aarch64 the 128 bytes of a visit take 75
// instructions, 32 of them smlal, as g++ 12 compiles it: counted, not timed.
#ifndef DEADBAND_INT4_ROW_INL_H
#define DEADBAND_INT4_ROW_INL_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "bytes-inl.h"
#include "encode-inl.h"
#include "lines-inl.h"
#include "sizes-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// What sums are scaled in: one vector, but no longer than 256 bits, as the sums come in halves of 8.
constexpr int kScaled = kLanes < 8 ? kLanes : 8;
typedef float Vscaled __attribute__((vector_size(4 * kScaled)));

DEADBAND_INLINE Vscaled load_scaled(const float* p) {
  Vscaled v;
  memcpy(&v, p, sizeof v);
  return v;
}
DEADBAND_INLINE Vscaled load_scaled(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vscaled)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return load_half(p);
#endif
}

#if defined(__AVX2__)
typedef __m256i LineSums[8];

DEADBAND_INLINE void start_line(LineSums sums, int32_t start) {
  for (int i = 0; i < 8; ++i) sums[i] = _mm256_set1_epi16((int16_t)start);
}

DEADBAND_INLINE void add_products(__m256i* sum, __m256i codes, __m256i x) {
  *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, x));
}

DEADBAND_INLINE void add_rows(LineSums sums, const uint8_t* a, const uint8_t* b, int32_t word) {
  const __m256i x = _mm256_set1_epi32(word), lower = _mm256_set1_epi8(15);
  for (int i = 0; i < 8; i += 4, a += 32, b += 32) {
    __m256i bytes_a = _mm256_loadu_si256((const __m256i*)a), bytes_b = _mm256_loadu_si256((const __m256i*)b);
    __m256i low = _mm256_unpacklo_epi8(bytes_a, bytes_b), high = _mm256_unpackhi_epi8(bytes_a, bytes_b);
    add_products(&sums[i], _mm256_and_si256(low, lower), x);
    add_products(&sums[i + 1], _mm256_and_si256(high, lower), x);
    add_products(&sums[i + 2], _mm256_and_si256(_mm256_srli_epi16(low, 4), lower), x);
    add_products(&sums[i + 3], _mm256_and_si256(_mm256_srli_epi16(high, 4), lower), x);
  }
}

// Sums of kScaled neighbours, those from output kScaled * n on. Four vectors have the sums of 64 outputs: in their
// lower halves those of the first 32.
DEADBAND_INLINE Vscaled sums_of(const LineSums sums, int n) {
  __m256i v = sums[n / 8 * 4 + n % 4];
  __m128i half = n / 4 % 2 ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v);
  return (Vscaled)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
}
#else
typedef int16_t Vs __attribute__((vector_size(16)));
typedef Vs LineSums[16];

DEADBAND_INLINE void start_line(LineSums sums, int32_t start) {
  for (int i = 0; i < 16; ++i) sums[i] = Vs{} + (int16_t)start;
}

DEADBAND_INLINE void add_row(LineSums sums, const uint8_t* row, int8_t entry) {
  for (int i = 0; i < 16; i += 4, row += 16) {
#if defined(__aarch64__)
    uint8x16_t bytes = vld1q_u8(row);
    int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
    int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), x = vdupq_n_s8(entry);
    sums[i] = (Vs)vmlal_s8((int16x8_t)sums[i], vget_low_s8(low), vget_low_s8(x));
    sums[i + 1] = (Vs)vmlal_high_s8((int16x8_t)sums[i + 1], low, x);
    sums[i + 2] = (Vs)vmlal_s8((int16x8_t)sums[i + 2], vget_low_s8(high), vget_low_s8(x));
    sums[i + 3] = (Vs)vmlal_high_s8((int16x8_t)sums[i + 3], high, x);
#else
    typedef uint8_t Bytes __attribute__((vector_size(8)));
    Bytes bytes[2];
    memcpy(bytes, row, sizeof bytes);
    for (int half = 0; half < 2; ++half) {
      sums[i + half] += __builtin_convertvector(bytes[half] & 15, Vs) * (int16_t)entry;
      sums[i + 2 + half] += __builtin_convertvector(bytes[half] >> 4, Vs) * (int16_t)entry;
    }
#endif
  }
}

DEADBAND_INLINE void add_rows(LineSums sums, const uint8_t* a, const uint8_t* b, int32_t word) {
  add_row(sums, a, (int8_t)word);
  add_row(sums, b, (int8_t)(word >> 8));
}

DEADBAND_INLINE Vscaled sums_of(const LineSums sums, int n) {
  typedef int16_t Four __attribute__((vector_size(8)));
  Four half;
  memcpy(&half, (const char*)(sums + n / 2) + n % 2 * sizeof half, sizeof half);
  return __builtin_convertvector(half, Vscaled);
}
#endif

// A chunk's sums of one line, in float32 and scaled, are added to those of the chunks before.
template <bool Minimum>
DEADBAND_INLINE void flush_line(const LineSums line, float step, int32_t sum, const uint16_t* scales,
                                const uint16_t* minimum, float* sums) {
  const Vscaled zero = {};
  // whole numbers below 2^24: what a zero weight gives is zero
  Vscaled steps = zero + step, lowest = zero + step * (float)sum, centre = zero + (float)(8 * sum);
  for (int n = 0; n < 2 * kLine / kScaled; ++n) {
    int64_t o = n * kScaled;
    Vscaled value = (Minimum ? sums_of(line, n) + centre : sums_of(line, n)) * steps;
    Vscaled before = load_scaled(sums + o);
    value = scales ? value * load_scaled(scales + o) + before : value + before;
    if (Minimum) value += load_scaled(minimum + o) * lowest;
    memcpy(sums + o, &value, sizeof value);
  }
}

// The product of a chunk with the outputs of a line.
template <bool Minimum>
struct Int4Row {
  static constexpr int kBits = 4;

  template <bool Whole>
  static DEADBAND_INLINE void add_line(const Encoded& x, int64_t c, int64_t byte, const uint8_t* end, Ahead ahead,
                                       const uint16_t* scales, const uint16_t* minimum, float* sums) {
    const Chunk& chunk = x.chunk[c];
    const uint8_t* const* codes = x.codes + 4 * chunk.first;
    const int32_t* words = x.words + 2 * chunk.first;
    uint8_t parts[2][kLine];
    LineSums line;
    start_line(line, -8 * x.sum[c]);
    for (int64_t p = 0; p < chunk.pairs; ++p, codes += 2, ahead.codes += 2) {
      for (int k = 0; k < 2; ++k) __builtin_prefetch(ahead.codes[k] + ahead.byte, 0, 2);
      add_rows(line, line_at<Whole>(codes[0] + byte, end, parts[0]), line_at<Whole>(codes[1] + byte, end, parts[1]),
               words[p]);
    }
    flush_line<Minimum>(line, x.step[c], x.sum[c], scales, minimum, sums);
  }
};

}  // namespace
}  // namespace deadband

#endif
