// x as quantised weights meet it: cut into chunks of inputs, with the places of their codes.
//
// Entries of x become 16-bit integers, with a step of their own for each chunk. That rounding (2^-16 of the chunk's
// largest entry) is far below that of bfloat16. Rounding x to 8 bits for 4-bit weights, with half the products, gains
// nothing.
#ifndef DEADBAND_ENCODE_INL_H
#define DEADBAND_ENCODE_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes-inl.h"
#include "kernels.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

constexpr int64_t kChunkMany = 4 * kMostQuads;
// Inputs of one chunk: of one group, so that they share their scales, and few enough for the 32-bit sums. With few rows
// of x there are fewer of them, as many rows of codes come from memory side by side: 128, for two rows of x, read half
// as fast. Where sums are scaled once, in the end, even fewer. With many rows of x longer sums save time. Measured as
// in quantized-inl.h, one row: chunks of 16 inputs cost up to 7 % with scales of groups, those of 32 cost 10 % without,
// and those of 64 up to 20 %, nothing skipped.
DEADBAND_INLINE int64_t chunk_size(int64_t rows, bool in_groups) {
  if (rows > 16) return kChunkMany;
  return rows == 1 && !in_groups ? 16 : 32;
}
constexpr int64_t kEncodedPerThread = 16384;

struct Quantized {
  int bits;
  const uint8_t* codes;              // [in][row_bytes]
  const uint16_t *scales, *minimum;  // [groups][out] float16, or nullptr
  const float* channel_scales;       // [out] where there are no groups, else nullptr
  int64_t group_size, row_bytes, in, out;
};

DEADBAND_INLINE Quantized quantized_of(const deadband_layer& layer, int64_t in) {
  int64_t groups = layer.group_size;
  return {(int)layer.bits,
          (const uint8_t*)layer.weight,
          groups ? (const uint16_t*)layer.scales : nullptr,
          (const uint16_t*)layer.minimum,
          groups ? nullptr : (const float*)layer.scales,
          groups ? groups : in + 1,
          layer.bits == 8 ? layer.out : (layer.out + 31) / 32 * 16,
          in,
          layer.out};
}

DEADBAND_INLINE const uint8_t* end_of(const Quantized& w) { return w.codes + w.in * w.row_bytes; }

struct Chunk {
  int64_t entry, count;  // the kept inputs in it
  int64_t first, quads;  // the quads that they fill
  int64_t group;
  int64_t pairs;  // of rows of codes, where they are multiplied in pairs
};

// x, quantised, chunk by chunk.
struct Encoded {
  int64_t rows, chunks;
  Chunk* chunk;
  const uint8_t** codes;  // [4 * quads]: the codes of each input
  int32_t* words;         // [chunks][rows][2][quads of the chunk], as the product takes them
  float* step;            // [chunks][rows]: an entry is its integer times this
  int32_t* sum;           // [chunks][rows]: of the integers
};

// Integers for the values of a chunk. Whole vectors of values are read, those beyond `count` not used. Returns the
// step; NaN if a value is not finite.
template <class T>
DEADBAND_INLINE float encode_values(const T* values, int64_t count, int64_t quads, int32_t* words, int32_t* sum) {
  Vi numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  auto value_at = [&](int64_t i) __attribute__((always_inline)) {
    Vf value = load_in_order(values + i);
    return i + kLanes <= count ? value : (Vf)((Vi)value & (numbers < splat_int((int32_t)(count - i))));
  };
  Vi largest = {};  // as bits: those of NaN and infinity are larger than those of any number
  for (int64_t i = 0; i < count; i += kLanes) {
    Vi size = (Vi)magnitude(value_at(i));
    largest = size > largest ? size : largest;
  }
  int32_t bits = most_of_lanes(largest);
  *sum = 0;
  if (bits >= 0x7f800000) {
    memset(words, 0, 2 * quads * sizeof *words);
    return __builtin_nanf("");
  }
  float most;
  memcpy(&most, &bits, sizeof most);
  float inverse = kLargestEntry / most;
  if (!(inverse <= 3.40282347e38f)) inverse = 0.0f;  // all zero, or too small to matter
  int32_t integers[kChunkMany];
  Vi all = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Vf scaled = value_at(i) * inverse;
    Vf half = (Vf)(((Vu)scaled & 0x80000000u) | 0x3f000000u);  // away from zero; conversion cuts off
    Vi each = __builtin_convertvector(scaled + half, Vi);
    memcpy(integers + i, &each, sizeof each);
    all += each;
  }
  for (int64_t i = round_up(count, kLanes); i < 4 * quads; ++i) integers[i] = 0;
  encode_entries(integers, quads, words);
  *sum = sum_of_lanes(all);
  return most / kLargestEntry;
}

// The same for weights of 4 bits, as pairs of signed bytes: (second << 8 | first) * 0x10001. An entry that takes more
// steps than a byte holds becomes several, each with the row of codes. Returns the step; `pairs`: how many there are.
//
// 9/4 of the root mean square of the chunk are 127 steps. So rounding costs 0.5 % of the product, whatever the values,
// where the codes' own rounding costs about 9 %; entries become fewer than 6/5 as many; and their sizes sum up to
// less than 4096 steps, if they are kNibblesMany or fewer.
constexpr int64_t kNibblesMany = 64;
template <class T>
DEADBAND_INLINE float encode_nibbles(const T* values, int64_t count, const uint8_t** codes, int32_t* words,
                                     int32_t* sum, int64_t* pairs) {
  Vi numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  float value[kNibblesMany + kLanes];
  Vi largest = {};  // as bits: those of NaN and infinity are larger than those of any number
  for (int64_t i = 0; i < count; i += kLanes) {
    Vf each = load_in_order(values + i);
    if (i + kLanes > count) each = (Vf)((Vi)each & (numbers < splat_int((int32_t)(count - i))));
    store(value + i, each);
    Vi size = (Vi)magnitude(each);
    largest = size > largest ? size : largest;
  }
  int32_t bits = most_of_lanes(largest);
  *sum = 0;
  *pairs = (count + 1) / 2;
  if (bits >= 0x7f800000) {
    memset(words, 0, *pairs * sizeof *words);
    return __builtin_nanf("");
  }
  float most;
  memcpy(&most, &bits, sizeof most);
  float scale = 1.0f / most;
  if (!(scale <= 3.40282347e38f)) scale = 0.0f;  // all zero, or too small to matter
  Vf squares = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Vf each = load(value + i) * scale;
    squares += each * each;
  }
  float limit = 2.25f * __builtin_sqrtf(sum_lanes(squares) / (float)count);  // in parts of the largest
  float inverse = limit > 0 ? 127.0f / limit * scale : 0.0f;
  if (!(inverse <= 3.40282347e38f)) inverse = 0.0f;
  int32_t steps[2 * kNibblesMany];
  Vi all = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Vf scaled = load(value + i) * inverse;
    Vf half = (Vf)(((Vu)scaled & 0x80000000u) | 0x3f000000u);  // away from zero; conversion cuts off
    Vi each = __builtin_convertvector(scaled + half, Vi);
    memcpy(steps + i, &each, sizeof each);
    all += each;
  }
  *sum = sum_of_lanes(all);
  if (most * inverse >= 127.5f) {
    const uint8_t* own[kNibblesMany];
    int32_t entries[kNibblesMany];
    memcpy(own, codes, count * sizeof *own);
    memcpy(entries, steps, count * sizeof *entries);
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int32_t left = entries[i]; left;) {
        int32_t part = left > 127 ? 127 : left < -127 ? -127 : left;
        codes[rows] = own[i];
        steps[rows++] = part;
        left -= part;
      }
    count = rows;
    *pairs = (count + 1) / 2;
    steps[count] = 0;
    if (count & 1) codes[count] = codes[count - 1];
  }
  for (int64_t p = 0; p < *pairs; ++p)
    words[p] = (int32_t)(((steps[2 * p] & 255u) | (steps[2 * p + 1] & 255u) << 8) * 0x10001u);
  return most * limit / 127.0f;
}

// Cuts the kept inputs (all where `index` is NULL) into chunks of `most` or a little less, as even as can be within a
// group, and notes where their weights lie. With `repeats` there is room for what encode_nibbles adds.
void cut_chunks(const int32_t* index, int64_t count, const Quantized& w, int64_t most, bool repeats, Encoded* x) {
  int64_t chunks = 0, quads = 0, group = 0, end = w.group_size;
  for (int64_t i = 0; i < count;) {
    for (int64_t input = index ? index[i] : i; input >= end; end += w.group_size) ++group;
    int64_t stop = min_of(end, count);
    if (index && end < w.in)
      for (stop = i; stop < count && index[stop] < end;) ++stop;
    else if (index)
      stop = count;
    while (i < stop) {
      int64_t left = stop - i, pieces = (left + most - 1) / most;
      int64_t own = pieces == 1 ? left : round_up(left / pieces, 4), own_quads = (own + (repeats ? own / 5 : 0) + 3) / 4;
      x->chunk[chunks++] = {i, own, quads, own_quads, group, 0};
      const uint8_t** to = x->codes + 4 * quads;
      quads += own_quads;
      for (; own; --own, ++i) *to++ = w.codes + (index ? index[i] : i) * w.row_bytes;
      for (; to < x->codes + 4 * quads; ++to) *to = to[-1];
    }
  }
  x->chunks = chunks;
}

// Memory for an x that is encoded for a weight.
struct EncodedSizes {
  int64_t chunks, quads, rows;

  EncodedSizes(const Quantized& w, int64_t rows) : rows(rows) {
    chunks = w.in / chunk_size(rows, w.scales) + w.in / w.group_size + 2;
    quads = w.in * 3 / 10 + chunks;
  }
  size_t chunk() const { return round_up(chunks * sizeof(Chunk), 64); }
  size_t codes() const { return round_up(quads * 4 * sizeof(char*), 64); }
  size_t words() const { return round_up(quads * rows * 2 * sizeof(int32_t), 64); }
  size_t step() const { return round_up(chunks * rows * sizeof(float), 64); }
  size_t total() const { return chunk() + codes() + words() + 2 * step(); }
};

// `kept.index` is NULL where nothing is selected: then kept.count is the number of inputs.
template <class T>
Encoded encode(const Input<T>& input, const Kept& kept, const Quantized& w, int threads, char* memory) {
  EncodedSizes sizes(w, input.rows);
  int64_t rows = input.rows;
  Encoded encoded = {rows,
                     0,
                     (Chunk*)memory,
                     (const uint8_t**)(memory += sizes.chunk()),
                     (int32_t*)(memory += sizes.codes()),
                     (float*)(memory += sizes.words()),
                     (int32_t*)(memory += sizes.step())};
  bool nibbles = w.bits == 4 && rows == 1;
  cut_chunks(kept.index, kept.count, w, nibbles ? kNibblesMany : chunk_size(rows, w.scales), nibbles, &encoded);
  parallel(threads_for(rows * kept.count, kEncodedPerThread, threads), [&](int part, int parts) {
    Range mine = share(encoded.chunks, 1, part, parts);
    for (int64_t c = mine.begin; c < mine.end; ++c) {
      Chunk& chunk = encoded.chunk[c];
      if (nibbles) {
        const uint8_t** codes = encoded.codes + 4 * chunk.first;
        int32_t *words = encoded.words + 2 * chunk.first, *sum = encoded.sum + c;
        encoded.step[c] = kept.index ? encode_nibbles(kept.value + chunk.entry, chunk.count, codes, words, sum, &chunk.pairs)
                                     : encode_nibbles(input.x + chunk.entry, chunk.count, codes, words, sum, &chunk.pairs);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        int32_t* words = encoded.words + 2 * (chunk.first * rows + chunk.quads * r);
        int32_t* sum = encoded.sum + c * rows + r;
        float* step = encoded.step + c * rows + r;
        float values[kChunkMany + kLanes];
        const float* from = values;
        if (kept.index && rows == 1)
          from = kept.value + chunk.entry;
        else
          for (int64_t k = 0; k < chunk.count; ++k)
            values[k] = kept.index ? kept.value[(chunk.entry + k) * rows + r]
                                   : to_float(input.x[r * input.stride + chunk.entry + k]);
        *step = encode_values(from, chunk.count, chunk.quads, words, sum);
      }
    }
  });
  return encoded;
}

}  // namespace
}  // namespace deadband

#endif
