// x as quantised weights meet it: cut into chunks of inputs, with the places of their codes, and rounded to integers
// with a step of their own for each chunk. This is the way of one row of x; panels-inl.h has that of more.
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

// The most inputs of a chunk: of one group, so that they share their scales, and few enough for the sums. The more
// there are, the less often sums are scaled; but as many rows of codes come from memory side by side. Measured on Zen
// 4, 8 bits without groups, half skipped, rows of 2 and 8 KB: 32 inputs take 12 to 18 % longer than 64, and 16 up to 25
// %.
constexpr int64_t kChunkMost = 64;
constexpr int64_t kEncodedPerThread = 2048;

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

constexpr int64_t kRowsOfTile = 4;  // rows whose sums fit the registers
// Tiles of rows differ by one row at most: 5 rows are 3 and 2, not 4 and 1.
DEADBAND_INLINE int64_t row_tiles(int64_t rows) { return (rows + kRowsOfTile - 1) / kRowsOfTile; }
DEADBAND_INLINE Range row_tile(int64_t rows, int64_t tile) { return share(rows, 1, (int)tile, (int)row_tiles(rows)); }

// Of several rows: the steps whose codes a tile of them meets again: how many, and which.
struct Again {
  uint8_t count, step[31];
};

// x, quantised, chunk by chunk.
struct Encoded {
  int64_t rows, chunks;
  Chunk* chunk;
  const uint8_t** codes;  // [4 * quads]: the codes of each input
  int32_t* words;         // [chunks][rows][2][quads of the chunk], as the product takes them
  float* step;            // [chunks][rows]: an entry is its integer times this
  int32_t* sum;           // [chunks][rows]: of the integers
  Again* again;           // [chunks][tiles of rows]
};

// Bits of the largest magnitude among whole vectors of values: those of NaN and infinity are larger than of any number.
DEADBAND_INLINE int32_t largest_bits(const float* values, int64_t count) {
  Vi largest = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Vi size = (Vi)magnitude(load(values + i));
    largest = size > largest ? size : largest;
  }
  return most_of_lanes(largest);
}
constexpr int32_t kInfinityBits = 0x7f800000;

// Whole vectors of values in steps, halves away from zero. Returns their sum. `inverse`: of the step.
DEADBAND_INLINE int32_t round_to_steps(const float* values, int64_t count, float inverse, int32_t* steps) {
  Vi all = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Vf scaled = load(values + i) * inverse;
    Vf half = (Vf)(((Vu)scaled & 0x80000000u) | 0x3f000000u);  // conversion cuts off
    Vi each = __builtin_convertvector(scaled + half, Vi);
    memcpy(steps + i, &each, sizeof each);
    all += each;
  }
  return sum_of_lanes(all);
}

// 1 / step, or zero where that is no number: all values are zero then, or too small to matter.
DEADBAND_INLINE float inverse_of(float step) {
  float inverse = 1.0f / step;
  return inverse <= 3.40282347e38f ? inverse : 0.0f;
}

// The root mean square of the first `count` values, the rest of the last vector zero, in parts of `most`, the largest.
DEADBAND_INLINE float root_mean_square(const float* values, int64_t count, float most) {
  Vf squares = {};
  float inverse = inverse_of(most);
  for (int64_t i = 0; i < count; i += kLanes) {
    Vf part = load(values + i) * inverse;
    squares += part * part;
  }
  return __builtin_sqrtf(sum_lanes(squares) / (float)count);
}

// A chunk for weights of 8 bits: 16-bit integers, of which the largest is kLargestEntry. That rounding is far below
// that of bfloat16. Returns the step.
DEADBAND_INLINE float encode_octets(const float* values, float most, int64_t count, int64_t quads, int32_t* words,
                                    int32_t* sum) {
  int32_t steps[kChunkMost + kLanes];
  float step = most / kLargestEntry;
  *sum = round_to_steps(values, round_up(count, kLanes), inverse_of(step), steps);
  for (int64_t i = round_up(count, kLanes); i < 4 * quads; ++i) steps[i] = 0;
  encode_entries(steps, quads, words);
  return step;
}

// A chunk for weights of 4 bits: pairs of signed bytes, (second << 8 | first) * 0x10001. An entry of more steps than a
// byte holds becomes several, each with the row of codes. Returns the step; `pairs`: how many there are.
//
// 9/4 of the root mean square of the chunk are 127 steps. So rounding costs half a percent of the product, whatever the
// values, where the codes' own rounding costs nine; entries become fewer than 6/5 as many; and the sum of their
// magnitudes stays below 4096.
DEADBAND_INLINE float encode_nibbles(const float* values, float most, int64_t count, const uint8_t** codes,
                                     int32_t* words, int32_t* sum, int64_t* pairs) {
  int32_t steps[kChunkMost + kLanes], parts[2 * kChunkMost];
  float step = most * root_mean_square(values, count, most) * (2.25f / 127);
  *sum = round_to_steps(values, round_up(count, kLanes), inverse_of(step), steps);
  const int32_t* entries = steps;
  if (most > 127 * step) {
    const uint8_t* own[kChunkMost];
    memcpy(own, codes, count * sizeof *own);
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int32_t left = steps[i]; left; left -= parts[rows++]) {
        codes[rows] = own[i];
        parts[rows] = left > 127 ? 127 : left < -127 ? -127 : left;
      }
    parts[rows] = 0;
    codes[rows] = own[0];
    count = rows;
    entries = parts;
  } else
    steps[count] = 0;
  *pairs = (count + 1) / 2;
  for (int64_t p = 0; p < *pairs; ++p)
    words[p] = (int32_t)(((entries[2 * p] & 255u) | (entries[2 * p + 1] & 255u) << 8) * 0x10001u);
  return step;
}

// Cuts the kept inputs (all where `index` is NULL) into chunks of `most` or a little less, as even as can be within a
// group. With `repeats` there is room for what encode_nibbles adds, and for one more.
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
      int64_t own = pieces == 1 ? left : round_up(left / pieces, 4);
      int64_t own_quads = (own + (repeats ? own / 5 + 1 : 0) + 3) / 4;
      x->chunk[chunks++] = {i, own, quads, own_quads, group, 0};
      quads += own_quads;
      i += own;
    }
  }
  x->chunks = chunks;
}

// Notes where the codes of a chunk's inputs lie; the last stand for what is left of the quads.
DEADBAND_INLINE void place_codes(const int32_t* index, const Chunk& chunk, const Quantized& w, const uint8_t** codes) {
  for (int64_t k = 0; k < chunk.count; ++k)
    codes[k] = w.codes + (index ? index[chunk.entry + k] : chunk.entry + k) * w.row_bytes;
  for (int64_t k = chunk.count; k < 4 * chunk.quads; ++k) codes[k] = codes[k - 1];
}

// A chunk's fetches look at as many codes of a later chunk as it has itself: past those of the last, at these.
constexpr int64_t kFetchedBeyond = 2 * kChunkMost;

// Memory for rows of x that are encoded for a weight, `most` inputs in a chunk; of a single one, with what
// encode_nibbles adds.
struct EncodedSizes {
  int64_t rows, words_of_quad, chunks, quads;

  EncodedSizes(const Quantized& w, int64_t rows, int64_t most)
      : rows(rows), words_of_quad(rows > 1 && w.bits == 4 ? 4 : 2) {
    chunks = w.in / most + w.in / w.group_size + 2;
    quads = w.in * 3 / 10 + 2 * chunks;
  }
  size_t chunk() const { return round_up(chunks * sizeof(Chunk), 64); }
  size_t codes() const { return round_up((quads * 4 + kFetchedBeyond) * sizeof(char*), 64); }
  size_t words() const { return round_up(quads * rows * words_of_quad * sizeof(int32_t), 64); }
  size_t step() const { return round_up(chunks * rows * sizeof(float), 64); }
  size_t again() const { return rows > 1 ? chunks * row_tiles(rows) * sizeof(Again) : 0; }
  size_t total() const { return chunk() + codes() + words() + 2 * step() + again(); }

  // An x that is to be filled in.
  Encoded in(char* memory) const {
    Encoded x = {rows, 0, (Chunk*)memory, nullptr, nullptr, nullptr, nullptr, nullptr};
    x.codes = (const uint8_t**)(memory += chunk());
    x.words = (int32_t*)(memory += codes());
    x.step = (float*)(memory += words());
    x.sum = (int32_t*)(memory += step());
    x.again = (Again*)(memory + step());
    return x;
  }
};

// Chunk `c` of a row.
template <class T>
void encode_chunk(const Input<T>& input, const Kept& kept, const Quantized& w, int64_t c, Encoded* x) {
  Chunk& chunk = x->chunk[c];
  const uint8_t** codes = x->codes + 4 * chunk.first;
  int32_t* words = x->words + 2 * chunk.first;
  place_codes(kept.index, chunk, w, codes);
  float values[kChunkMost + kLanes], most;
  for (int64_t k = 0; k < chunk.count; ++k)
    values[k] = kept.index ? kept.value[chunk.entry + k] : to_float(input.x[chunk.entry + k]);
  for (int64_t k = chunk.count; k < chunk.count + kLanes; ++k) values[k] = 0;
  int32_t largest = largest_bits(values, round_up(chunk.count, kLanes));
  memcpy(&most, &largest, sizeof most);
  chunk.pairs = (chunk.count + 1) / 2;
  x->sum[c] = 0;
  if (largest >= kInfinityBits) {
    memset(words, 0, 2 * chunk.quads * sizeof *words);
    x->step[c] = __builtin_nanf("");
  } else if (w.bits == 8)
    x->step[c] = encode_octets(values, most, chunk.count, chunk.quads, words, x->sum + c);
  else
    x->step[c] = encode_nibbles(values, most, chunk.count, codes, words, x->sum + c, &chunk.pairs);
}

// `kept.index` is NULL where nothing is selected: then kept.count is the number of inputs.
template <class T>
Encoded encode(const Input<T>& input, const Kept& kept, const Quantized& w, int threads, char* memory) {
  Encoded encoded = EncodedSizes(w, 1, kChunkMost).in(memory);
  cut_chunks(kept.index, kept.count, w, kChunkMost, w.bits == 4, &encoded);
  if (encoded.chunks) {
    const Chunk& last = encoded.chunk[encoded.chunks - 1];
    for (int64_t k = 0; k < kFetchedBeyond; ++k) encoded.codes[4 * (last.first + last.quads) + k] = w.codes;
  }
  parallel(threads_for(kept.count, kEncodedPerThread, threads), [&](int part, int parts) {
    Range mine = share(encoded.chunks, 1, part, parts);
    for (int64_t c = mine.begin; c < mine.end; ++c) encode_chunk(input, kept, w, c, &encoded);
  });
  return encoded;
}

}  // namespace
}  // namespace deadband

#endif
