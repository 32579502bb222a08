// Vectors of one register, loads and stores of float32 and bfloat16.
// Written with the vector extensions of gcc and clang: the same source gives SSE2, AVX2, AVX-512 and NEON.
#ifndef DEADBAND_VECTOR_INL_H
#define DEADBAND_VECTOR_INL_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "sizes-inl.h"

namespace deadband {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kBlock = 2 * kLanes;  // the pair of vectors that the kernels step by

typedef float Vf __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Vu __attribute__((vector_size(kVectorBytes)));
typedef uint16_t bf16;

DEADBAND_INLINE Vf splat(float value) { return value - Vf{}; }  // x - 0 is x for every x, -0 and NaN too; x + 0 is not
DEADBAND_INLINE Vf load(const float* p) {
  Vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
DEADBAND_INLINE void store(float* p, Vf v) { memcpy(p, &v, sizeof v); }

DEADBAND_INLINE float to_float(float value) { return value; }
DEADBAND_INLINE float to_float(bf16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// A block in registers. Of float32 it is two consecutive vectors. Of bfloat16 it is the even and the odd entries: each
// is one shift or one mask away from the 32-bit lanes that were loaded, where consecutive order would cost shuffles
// both ways. Sums are kept in this order, and put right by the same trick when they are stored.
struct Pair {
  Vf a, b;
};

DEADBAND_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
DEADBAND_INLINE Pair load_pair(const bf16* p) {
  Vu u;
  memcpy(&u, p, sizeof u);
  return {(Vf)(u << 16), (Vf)(u & 0xffff0000u)};
}

// To nearest, ties to even; a NaN keeps its upper bits, and one more lest it becomes infinity. In the upper half.
DEADBAND_INLINE Vu rounded_bits(Vf v) {
  Vu u = (Vu)v;
  Vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  Vu nan = (Vu)(v != v);
  return (rounded & ~nan) | ((u | 0x400000u) & nan);
}

DEADBAND_INLINE void store_pair(float* p, Pair v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}
DEADBAND_INLINE void store_pair(bf16* p, Pair v) {
  Vu u = (rounded_bits(v.a) >> 16) | (rounded_bits(v.b) & 0xffff0000u);
  memcpy(p, &u, sizeof u);
}

// One vector, in order: not for the inner loops of bfloat16.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
DEADBAND_INLINE Vf load_in_order(const float* p) { return load(p); }
DEADBAND_INLINE Vf load_in_order(const bf16* p) {
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  return (Vf)(__builtin_convertvector(halves, Vu) << 16);
}
DEADBAND_INLINE void store_in_order(float* p, Vf v) { store(p, v); }
DEADBAND_INLINE void store_in_order(bf16* p, Vf v) {
  Halves halves = __builtin_convertvector(rounded_bits(v) >> 16, Halves);
  memcpy(p, &halves, sizeof halves);
}

DEADBAND_INLINE void store_one(float* p, float value) { *p = value; }
DEADBAND_INLINE void store_one(bf16* p, float value) { *p = (bf16)(rounded_bits(splat(value))[0] >> 16); }

// The first `count` < kBlock entries, and zeros.
template <class T>
DEADBAND_INLINE Pair load_pair_part(const T* p, int64_t count) {
  T block[kBlock] = {};
  memcpy(block, p, count * sizeof(T));
  return load_pair(block);
}
template <class T>
DEADBAND_INLINE void store_pair_part(T* p, Pair v, int64_t count) {
  T block[kBlock];
  store_pair(block, v);
  memcpy(p, block, count * sizeof(T));
}

DEADBAND_INLINE Vf magnitude(Vf v) { return (Vf)((Vu)v & 0x7fffffffu); }

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of lanes their numbers, a byte for each, side by side.
struct LaneNumbers {
  uint64_t of[256];
};
constexpr LaneNumbers lane_numbers() {
  LaneNumbers numbers = {};
  for (int mask = 0; mask < 256; ++mask)
    for (uint64_t lane = 0, count = 0; lane < 8; ++lane)
      if (mask >> lane & 1) numbers.of[mask] |= lane << 8 * count++;
  return numbers;
}
constexpr LaneNumbers kLaneNumbers = lane_numbers();
#endif

// The lanes with `keep`, and their numbers from `first` on, side by side; writes whole vectors. Returns how many.
DEADBAND_INLINE int64_t store_kept(float* values, int32_t* index, Vf v, Vu keep, int32_t first) {
#if defined(__AVX512F__)
  __mmask16 mask = _mm512_test_epi32_mask((__m512i)keep, (__m512i)keep);
  __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(first),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  // compressing to memory instead is slow on AMD
  store(values, (Vf)_mm512_maskz_compress_ps(mask, (__m512)v));
  _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(mask, numbers));
  return __builtin_popcount(mask);
#elif defined(__AVX2__)
  int mask = _mm256_movemask_ps((__m256)keep);
  __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)kLaneNumbers.of[mask]));
  _mm256_storeu_ps(values, _mm256_permutevar8x32_ps((__m256)v, lanes));
  _mm256_storeu_si256((__m256i*)index, _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
  return __builtin_popcount(mask);
#else
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    values[count] = v[lane];
    index[count] = first + lane;
    count += keep[lane] & 1;
  }
  return count;
#endif
}

DEADBAND_INLINE float sum_lanes(Vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace
}  // namespace deadband

#endif
