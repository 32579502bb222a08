// Vectors of bytes: four rows interleaved, and their products with four inputs, in the integer instructions that this
// instruction set has.
//
// Codes of weights are unsigned bytes here (signed ones where the dot product wants them so: kCodeZero tells), entries
// of x are 16-bit integers. Four of them travel as two 32-bit words, in whatever form the product takes.
#ifndef DEADBAND_BYTES_INL_H
#define DEADBAND_BYTES_INL_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "sizes-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

typedef int32_t Vi __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Vb __attribute__((vector_size(kVectorBytes)));

DEADBAND_INLINE Vb load_bytes(const uint8_t* p) {
  Vb v;
  memcpy(&v, p, sizeof v);
  return v;
}
// As many bytes as there are lanes, in 32 bits each. Of __builtin_convertvector, g++ 12 makes moves of single bytes.
typedef int8_t SignedCodes __attribute__((vector_size(kLanes)));
typedef uint8_t Codes __attribute__((vector_size(kLanes)));
DEADBAND_INLINE Vi widen(SignedCodes codes) {
#if defined(__AVX512F__)
  return (Vi)_mm512_cvtepi8_epi32((__m128i)codes);
#elif defined(__AVX2__)
  return (Vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)codes));
#else
  return __builtin_convertvector(codes, Vi);
#endif
}
DEADBAND_INLINE Vi widen(Codes codes) {
#if defined(__AVX512F__)
  return (Vi)_mm512_cvtepu8_epi32((__m128i)codes);
#elif defined(__AVX2__)
  return (Vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)codes));
#else
  return __builtin_convertvector(codes, Vi);
#endif
}

DEADBAND_INLINE Vi splat_int(int32_t value) { return value - Vi{}; }

DEADBAND_INLINE int32_t most_of_lanes(Vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
#endif
}
DEADBAND_INLINE int32_t sum_of_lanes(Vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

#if defined(__AVX512BW__)
#define DEADBAND_UNPACK(name) (Vb) _mm512_##name((__m512i)a, (__m512i)b)
#elif defined(__AVX2__)
#define DEADBAND_UNPACK(name) (Vb) _mm256_##name((__m256i)a, (__m256i)b)
#elif defined(__SSE2__)
#define DEADBAND_UNPACK(name) (Vb) _mm_##name((__m128i)a, (__m128i)b)
#endif

// Bytes or 16-bit words of a and b in turn, from the lower or upper half of each 16 bytes.
#if defined(DEADBAND_UNPACK)
DEADBAND_INLINE Vb zip_bytes_low(Vb a, Vb b) { return DEADBAND_UNPACK(unpacklo_epi8); }
DEADBAND_INLINE Vb zip_bytes_high(Vb a, Vb b) { return DEADBAND_UNPACK(unpackhi_epi8); }
DEADBAND_INLINE Vb zip_words_low(Vb a, Vb b) { return DEADBAND_UNPACK(unpacklo_epi16); }
DEADBAND_INLINE Vb zip_words_high(Vb a, Vb b) { return DEADBAND_UNPACK(unpackhi_epi16); }
#else
template <int Width>
DEADBAND_INLINE Vb zip(Vb a, Vb b, int first) {
  Vb v;
  for (int k = 0; k < 8 / Width; ++k)
    for (int byte = 0; byte < Width; ++byte) {
      v[2 * Width * k + byte] = a[first + Width * k + byte];
      v[2 * Width * k + Width + byte] = b[first + Width * k + byte];
    }
  return v;
}
DEADBAND_INLINE Vb zip_bytes_low(Vb a, Vb b) { return zip<1>(a, b, 0); }
DEADBAND_INLINE Vb zip_bytes_high(Vb a, Vb b) { return zip<1>(a, b, 8); }
DEADBAND_INLINE Vb zip_words_low(Vb a, Vb b) { return zip<2>(a, b, 0); }
DEADBAND_INLINE Vb zip_words_high(Vb a, Vb b) { return zip<2>(a, b, 8); }
#endif

// Four rows -> four vectors of which each 32-bit lane holds the four rows' bytes of one column. Of the columns of each
// 16 bytes, vector j takes 4j to 4j + 3.
DEADBAND_INLINE void interleave(const Vb* rows, Vb* columns) {
  Vb ab_low = zip_bytes_low(rows[0], rows[1]), cd_low = zip_bytes_low(rows[2], rows[3]);
  Vb ab_high = zip_bytes_high(rows[0], rows[1]), cd_high = zip_bytes_high(rows[2], rows[3]);
  columns[0] = zip_words_low(ab_low, cd_low);
  columns[1] = zip_words_high(ab_low, cd_low);
  columns[2] = zip_words_low(ab_high, cd_high);
  columns[3] = zip_words_high(ab_high, cd_high);
}

// Vectors of `interleave`'s columns -> the columns in order.
DEADBAND_INLINE void order_columns(Vi* v) {
#if defined(__AVX512F__)
  __m512i a = _mm512_shuffle_i32x4((__m512i)v[0], (__m512i)v[1], 0x44);
  __m512i b = _mm512_shuffle_i32x4((__m512i)v[2], (__m512i)v[3], 0x44);
  __m512i c = _mm512_shuffle_i32x4((__m512i)v[0], (__m512i)v[1], 0xee);
  __m512i d = _mm512_shuffle_i32x4((__m512i)v[2], (__m512i)v[3], 0xee);
  v[0] = (Vi)_mm512_shuffle_i32x4(a, b, 0x88);
  v[1] = (Vi)_mm512_shuffle_i32x4(a, b, 0xdd);
  v[2] = (Vi)_mm512_shuffle_i32x4(c, d, 0x88);
  v[3] = (Vi)_mm512_shuffle_i32x4(c, d, 0xdd);
#elif defined(__AVX2__)
  __m256i a = (__m256i)v[0], b = (__m256i)v[1], c = (__m256i)v[2], d = (__m256i)v[3];
  v[0] = (Vi)_mm256_permute2x128_si256(a, b, 0x20);
  v[1] = (Vi)_mm256_permute2x128_si256(c, d, 0x20);
  v[2] = (Vi)_mm256_permute2x128_si256(a, b, 0x31);
  v[3] = (Vi)_mm256_permute2x128_si256(c, d, 0x31);
#else
  (void)v;
#endif
}

// The dot product of four bytes and four inputs in every 32-bit lane. Inputs are at most kLargestEntry, so that the
// sums of kMostQuads and codes up to 255 do not overflow. `words`: the first word of a quad; the other follows after as
// many as there are quads.
constexpr int32_t kLargestEntry = 127 * 256;
constexpr int64_t kMostQuads = 32;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define DEADBAND_BYTE_DOT
// Products of bytes with bytes: an entry is 256 * high + low, both signed. Each part has sums of its own.
constexpr int kParts = 2;
DEADBAND_INLINE void encode_entries(const int32_t* x, int64_t quads, int32_t* words) {
  int8_t high[4 * kMostQuads], low[4 * kMostQuads];
  for (int64_t i = 0; i < 4 * quads; ++i) {
    low[i] = (int8_t)x[i];
    high[i] = (int8_t)((x[i] - low[i]) >> 8);
  }
  memcpy(words, high, 4 * quads);
  memcpy(words + quads, low, 4 * quads);
}
DEADBAND_INLINE Vi dot_bytes(Vi sum, Vb codes, int32_t word) {
#if defined(__AVX512VNNI__)
  return (Vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(word));
#elif defined(__AVXVNNI__)
  return (Vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(word));
#else
  return (Vi)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, vreinterpretq_s8_s32(vdupq_n_s32(word)));
#endif
}
DEADBAND_INLINE void multiply_add(Vi* sums, Vb codes, const int32_t* words, int64_t quads) {
  sums[0] = dot_bytes(sums[0], codes, words[0]);
  sums[1] = dot_bytes(sums[1], codes, words[quads]);
}
DEADBAND_INLINE Vi total(const Vi* sums) { return (sums[0] << 8) + sums[1]; }
#else
// Products of 16-bit words: the first word holds the entries for the bytes 0 and 2 of a lane, the other for 1 and 3.
constexpr int kParts = 1;
DEADBAND_INLINE void encode_entries(const int32_t* x, int64_t quads, int32_t* words) {
  for (int64_t q = 0; q < quads; ++q, x += 4) {
    words[q] = (int32_t)((uint32_t)(uint16_t)x[0] | (uint32_t)x[2] << 16);
    words[quads + q] = (int32_t)((uint32_t)(uint16_t)x[1] | (uint32_t)x[3] << 16);
  }
}
DEADBAND_INLINE Vi multiply_words(Vi codes, int32_t word) {
#if defined(__AVX512BW__)
  return (Vi)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(word));
#elif defined(__AVX2__)
  return (Vi)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(word));
#elif defined(__SSE2__)
  return (Vi)_mm_madd_epi16((__m128i)codes, _mm_set1_epi32(word));
#else
  return (codes & 0xffff) * splat_int((int16_t)word) + (codes >> 16) * splat_int(word >> 16);
#endif
}
DEADBAND_INLINE void multiply_add(Vi* sums, Vb codes, const int32_t* words, int64_t quads) {
  typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
  Vi even = (Vi)codes & 0x00ff00ff, odd = (Vi)((Words)codes >> 8);
  sums[0] += multiply_words(even, words[0]) + multiply_words(odd, words[quads]);
}
DEADBAND_INLINE Vi total(const Vi* sums) { return sums[0]; }
#endif

// Eight-bit codes are stored signed; what is multiplied is the code plus kCodeZero.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int32_t kCodeZero = 0;
DEADBAND_INLINE Vb from_signed(Vb codes) { return codes; }
#else
constexpr int32_t kCodeZero = 128;
DEADBAND_INLINE Vb from_signed(Vb codes) { return codes ^ 0x80; }
#endif

// kLanes float16 values, all finite.
DEADBAND_INLINE Vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  Vu bits = __builtin_convertvector(halves, Vu);
  // the exponent's bias differs by 112; the multiplication makes subnormals normal, too
  Vf magnitude = (Vf)((bits & 0x7fff) << 13) * 0x1p112f;
  return (Vf)((Vu)magnitude | (bits & 0x8000) << 16);
#endif
}

}  // namespace
}  // namespace deadband

#endif
