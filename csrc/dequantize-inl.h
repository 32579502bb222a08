// The numbers that codes of 8 or 4 bits stand for, [in, out]: what a gradient is multiplied by.
#ifndef DEADBAND_DEQUANTIZE_INL_H
#define DEADBAND_DEQUANTIZE_INL_H

#include <stdint.h>
#include <string.h>

#include "bytes-inl.h"
#include "kernel_table.h"
#include "kernels.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// kLanes codes of consecutive outputs, from `o` on, which is a multiple of kLanes.
template <int Bits>
DEADBAND_INLINE Vf load_codes(const uint8_t* codes, int64_t o) {
  if constexpr (Bits == 8) {
    SignedCodes bytes;
    memcpy(&bytes, codes + o, sizeof bytes);
    return __builtin_convertvector(widen(bytes), Vf);
  } else {  // of 32 outputs, the first 16 are the lower halves of 16 bytes, the others the upper ones
    Codes bytes;
    memcpy(&bytes, codes + o / 32 * 16 + o % 16, sizeof bytes);
    bytes = o % 32 < 16 ? bytes & 15 : bytes >> 4;
    return __builtin_convertvector(widen(bytes), Vf);
  }
}

template <class T, int Bits, bool Grouped>
void dequantize_rows(Range rows, const uint8_t* codes, const void* scales, const void* minimum, int64_t group_size,
                     int64_t out, T* y) {
  typedef uint16_t Half;
  int64_t row_bytes = Bits == 8 ? out : (out + 31) / 32 * 16;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    int64_t first = Grouped ? i / group_size * out : 0;  // of the scales
    const uint8_t* row = codes + i * row_bytes;
    auto block = [&](const uint8_t* from, int64_t o, const float* wide, const Half* scale, const Half* least, T* to)
                     __attribute__((always_inline)) {
                       Vf value = load_codes<Bits>(from, o);
                       if (Bits == 4 && !least) value -= 8.0f;
                       value *= Grouped ? load_half(scale) : load(wide);
                       if (least) value += load_half(least);
                       store_in_order(to, value);
                     };
    const float* wide = (const float*)scales + first;
    const Half *scale = (const Half*)scales + first, *least = minimum ? (const Half*)minimum + first : nullptr;
    int64_t o = 0;
    for (; o + kLanes <= out; o += kLanes)
      block(row, o, wide + o, scale + o, least ? least + o : nullptr, y + i * out + o);
    if (int64_t rest = out - o) {
      float last_wide[kLanes] = {};
      Half last_scale[kLanes] = {}, last_least[kLanes] = {};
      uint8_t last_row[kLanes] = {};
      T last[kLanes];
      if (Grouped)
        memcpy(last_scale, scale + o, rest * sizeof(Half));
      else
        memcpy(last_wide, wide + o, rest * sizeof(float));
      if (least) memcpy(last_least, least + o, rest * sizeof(Half));
      if (Bits == 8) memcpy(last_row, row + o, rest);  // rows of 4 bits end with a whole block
      block(Bits == 8 ? last_row : row, Bits == 8 ? 0 : o, last_wide, last_scale, least ? last_least : nullptr, last);
      memcpy(y + i * out + o, last, rest * sizeof(T));
    }
  }
}

template <class T>
void dequantize_typed(int bits, const uint8_t* codes, const void* scales, const void* minimum, int64_t group_size,
                      int64_t in, int64_t out, T* y, int threads) {
  constexpr decltype(&dequantize_rows<T, 8, false>) kRows[2][2] = {
      {dequantize_rows<T, 4, false>, dequantize_rows<T, 4, true>},
      {dequantize_rows<T, 8, false>, dequantize_rows<T, 8, true>}};
  auto rows = kRows[bits == 8][group_size > 0];
  parallel(threads_for(in * out * (int64_t)sizeof(T), kBytesPerThread, threads),
           [&](int part, int parts) { rows(share(in, 1, part, parts), codes, scales, minimum, group_size, out, y); });
}

void dequantize(int dtype, int bits, const void* codes, const void* scales, const void* minimum, int64_t group_size,
                int64_t in, int64_t out, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    dequantize_typed(bits, (const uint8_t*)codes, scales, minimum, group_size, in, out, (float*)y, threads);
  else
    dequantize_typed(bits, (const uint8_t*)codes, scales, minimum, group_size, in, out, (bf16*)y, threads);
}

}  // namespace
}  // namespace deadband

#endif
