// What the product of several rows of x does with vectors: codes of a few inputs -> vectors of a panel, and those times
// the entries of a row, in the integer instructions that this instruction set has.
//
// A panel is filled once and met by many rows, so outputs are brought into order when it is filled: sums and scales
// need no shuffles then.
#ifndef DEADBAND_PANEL_DOT_INL_H
#define DEADBAND_PANEL_DOT_INL_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bytes-inl.h"
#include "sizes-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// Vectors of sums for each row of a tile: four rows' are half of the registers.
constexpr int kRowSums = kVectorBytes == 64 || kVectorBytes == 16 ? 4 : 2;

// Entries of x are integers up to this.
template <int Bits>
constexpr int32_t kMostEntry = Bits == 8 ? kLargestEntry : 127;
// What is taken off every code: it is done for all of a chunk's inputs in what the sums start with.
template <int Bits>
constexpr int32_t kZero = Bits == 8 ? kCodeZero : 8;

// So that `interleave` leaves columns in order: of each 16 bytes, 4 for every column.
DEADBAND_INLINE Vb spread(Vb v) {
#if defined(__AVX512F__)
  return (Vb)__builtin_shufflevector((Vu)v, (Vu)v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#elif defined(__AVX2__)
  return (Vb)__builtin_shufflevector((Vu)v, (Vu)v, 0, 2, 4, 6, 1, 3, 5, 7);
#else
  return v;
#endif
}

DEADBAND_INLINE Vb lower_nibbles(Vb v) { return v & 15; }
DEADBAND_INLINE Vb upper_nibbles_of(Vb v) {
#if defined(__x86_64__)
  return (Vb)((Vu)v >> 4) & 15;
#else
  return v >> 4;
#endif
}

// Four inputs in each 32-bit lane.
template <int Bits>
struct PanelDot {
  static constexpr int kInputs = 4, kNibbles = 8 / Bits, kColumnsOfBlock = 4;
#if defined(DEADBAND_BYTE_DOT)
  static constexpr int kWords = Bits == 8 ? 2 : 1, kRowParts = kWords;
#else
  static constexpr int kWords = 2, kRowParts = 1;
#endif
  static constexpr int kVectors = kRowSums / kRowParts;  // of a strip: its sums fit the registers
  static constexpr int kOutputVectors = kVectors;

  // The codes of a vector of columns.
  static DEADBAND_INLINE void split(const Vb* rows, Vb* to) {
    Vb spreads[4], columns[4];
#pragma GCC unroll 16
    for (int k = 0; k < 4; ++k) spreads[k] = spread(rows[k]);
    interleave(spreads, columns);
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c)
      if constexpr (Bits == 8)
        to[c] = from_signed(columns[c]);
      else {
        to[2 * c] = lower_nibbles(columns[c]);
        to[2 * c + 1] = upper_nibbles_of(columns[c]);
      }
  }
  // The output that vector `v` of a visit begins with.
  static DEADBAND_INLINE int64_t output(int v) {
    int64_t byte = v / kNibbles * kLanes;
    return Bits == 8 ? byte : byte / 16 * 32 + byte % 16 + v % 2 * 16;
  }
  static DEADBAND_INLINE void words(const int32_t* x, int32_t* to) {
#if defined(DEADBAND_BYTE_DOT)
    uint32_t high = 0, low = 0;
#pragma GCC unroll 16
    for (int k = 0; k < 4; ++k) {
      int8_t byte = (int8_t)x[k];
      low |= (uint32_t)(uint8_t)byte << 8 * k;
      high |= (uint32_t)(uint8_t)((x[k] - byte) >> 8) << 8 * k;
    }
    to[0] = (int32_t)low;
    if constexpr (Bits == 8) to[1] = (int32_t)high;
#else
    to[0] = (int32_t)((uint32_t)(uint16_t)x[0] | (uint32_t)x[2] << 16);
    to[1] = (int32_t)((uint32_t)(uint16_t)x[1] | (uint32_t)x[3] << 16);
#endif
  }
  static DEADBAND_INLINE void start(Vi* sums, int32_t sum) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = splat_int(-kZero<Bits> * sum);
      if constexpr (kRowParts == 2) sums[kVectors + v] = Vi{};
    }
  }
  static DEADBAND_INLINE void multiply(Vi* sums, const Vb* codes, const int32_t* words) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
#if defined(DEADBAND_BYTE_DOT)
      sums[v] = dot_bytes(sums[v], codes[v], words[0]);
      if constexpr (kRowParts == 2) sums[kVectors + v] = dot_bytes(sums[kVectors + v], codes[v], words[1]);
#else
      typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
      Vi even = (Vi)codes[v] & 0x00ff00ff, odd = (Vi)((Words)codes[v] >> 8);
      sums[v] += multiply_words(even, words[0]) + multiply_words(odd, words[1]);
#endif
    }
  }
  static DEADBAND_INLINE void totals(const Vi* sums, Vi* to) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) to[v] = kRowParts == 2 ? (sums[kVectors + v] << 8) + sums[v] : sums[v];
  }
};

#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(DEADBAND_BYTE_DOT)
// Two inputs in each 16-bit lane. Sums may wrap on their way: what they end with, codes less 8 times at most 32
// entries, is 8 * 32 * 127 at most, and less where some are larger than 127: the root mean square is 127 / 3.2 then.
template <>
struct PanelDot<4> {
  static constexpr int kInputs = 2, kNibbles = 2, kColumnsOfBlock = 2, kWords = 1, kRowParts = 1;
  static constexpr int kVectors = kRowSums, kOutputVectors = 2 * kVectors;

  static DEADBAND_INLINE void split(const Vb* rows, Vb* to) {
    Vb columns[2] = {zip_bytes_low(rows[0], rows[1]), zip_bytes_high(rows[0], rows[1])};
#pragma GCC unroll 16
    for (int c = 0; c < 2; ++c) {
      to[2 * c] = lower_nibbles(columns[c]);
      to[2 * c + 1] = upper_nibbles_of(columns[c]);
    }
  }
  // Vectors of outputs: two for each of the 16-bit sums. Of 64 outputs, the first 8 and the first 8 of the second half.
  static DEADBAND_INLINE int64_t output(int v) { return v / 8 * 64 + v / 4 % 2 * 8 + v / 2 % 2 * 16 + v % 2 * 32; }
  static DEADBAND_INLINE void words(const int32_t* x, int32_t* to) {
    to[0] = (int32_t)(((uint32_t)(uint8_t)x[0] | (uint32_t)(uint8_t)x[1] << 8) * 0x10001u);
  }
  static DEADBAND_INLINE void start(Vi* sums, int32_t sum) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[v] = (Vi)_mm256_set1_epi16((int16_t)(-8 * sum));
  }
  static DEADBAND_INLINE void multiply(Vi* sums, const Vb* codes, const int32_t* words) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      sums[v] =
          (Vi)_mm256_add_epi16((__m256i)sums[v], _mm256_maddubs_epi16((__m256i)codes[v], _mm256_set1_epi32(words[0])));
  }
  static DEADBAND_INLINE void totals(const Vi* sums, Vi* to) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      to[2 * v] = (Vi)_mm256_cvtepi16_epi32(_mm256_castsi256_si128((__m256i)sums[v]));
      to[2 * v + 1] = (Vi)_mm256_cvtepi16_epi32(_mm256_extracti128_si256((__m256i)sums[v], 1));
    }
  }
};
#endif

}  // namespace
}  // namespace deadband

#endif
