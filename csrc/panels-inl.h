// The quantised product for several rows of x. A chunk's codes of the outputs of a cache line are interleaved once,
// into a panel in the first-level cache, and the rows meet it there, kRowsOfTile at a time and a strip of outputs after
// another, so that their sums stay in registers.
//
// With 8-bit weights x becomes 16-bit integers, as a single row does. With 4-bit weights it becomes 8-bit ones, 32
// inputs at a time, in steps of 1/127 of the largest or of kLargeEntry times their root mean square: fewer than half of
// the products. What a larger entry exceeds that by meets its codes again. So rounding costs at most .7 % of the
// product, as noise (kLargeEntry / 127 over the root of 12), where the codes' own costs nine.
#ifndef DEADBAND_PANELS_INL_H
#define DEADBAND_PANELS_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes-inl.h"
#include "encode-inl.h"
#include "lines-inl.h"
#include "panel_dot-inl.h"
#include "quantized-inl.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

constexpr int64_t kSumsMany = 32768;            // sums of a tile of outputs: they stay in the second-level cache
constexpr int64_t kQuantizedRows = 256;         // rows of x that are encoded at a time
constexpr int64_t kChunkMany = 4 * kMostQuads;  // inputs of a chunk, at most
constexpr float kLargeEntry = 3.2f;             // at least the root of 8: the largest of 32 entries is two bytes then
constexpr int64_t kNear = 192;                  // bytes that the nearer fetch is ahead

// Inputs of one chunk. With few rows of x as many rows of codes come from memory side by side: 128, for two rows of x,
// read half as fast as 32. With many rows of x longer sums save time.
template <int Bits>
DEADBAND_INLINE int64_t panel_chunk(int64_t rows) {
  return Bits == 8 && rows > 16 ? kChunkMany : 32;
}
DEADBAND_INLINE int64_t panel_chunk(const Quantized& w, int64_t rows) {
  return w.bits == 8 ? panel_chunk<8>(rows) : panel_chunk<4>(rows);
}

// The first `count` of `room` values, the others zero -> integers and their sum. Of 8 bits the largest is kMostEntry;
// of 4 some may be nearly twice that. Returns the step; NaN if a value is not finite.
template <int Bits>
DEADBAND_INLINE float round_values(const float* values, int64_t count, int64_t room, int32_t* integers, int32_t* sum) {
  int32_t bits = largest_bits(values, room);
  if (bits >= kInfinityBits) {
    memset(integers, 0, room * sizeof *integers);
    *sum = 0;
    return __builtin_nanf("");
  }
  float most;
  memcpy(&most, &bits, sizeof most);
  float largest = kMostEntry<Bits>;  // as an integer: a whole number of steps, so that it cannot become infinite
  if constexpr (Bits == 4) {
    float limit = kLargeEntry * root_mean_square(values, count, most);  // in parts of the largest; 0 of nothing but 0
    if (limit > 0.0f && limit < 1.0f) largest = (float)(int32_t)(largest / limit);
  }
  float step = most / largest;
  *sum = round_to_steps(values, room, inverse_of(step), integers);
  return step;
}

// Of a row's integers, whole vectors of them: what each exceeds kMostEntry<4> by is taken off and put into `rest`.
// Returns a bit for each that did, of the first 32.
DEADBAND_INLINE uint32_t split_large(int32_t* integers, int64_t count, int32_t* rest) {
  Vi any = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Vi whole, most = splat_int(kMostEntry<4>);
    memcpy(&whole, integers + i, sizeof whole);
    Vi byte = whole > most ? most : whole < -most ? -most : whole, over = whole - byte;
    memcpy(integers + i, &byte, sizeof byte);
    memcpy(rest + i, &over, sizeof over);
    any |= over & 0x7fffffff;
  }
  uint32_t large = 0;
  if (most_of_lanes(any))
    for (int64_t k = 0; k < count; ++k) large |= (uint32_t)(rest[k] != 0) << k;
  return large;
}

// Where a chunk's words begin. With 4 bits there is room for every step twice.
template <int Bits>
DEADBAND_INLINE int32_t* words_of(const Encoded& x, const Chunk& chunk) {
  return x.words + (Bits == 8 ? 1 : 2) * 4 / PanelDot<Bits>::kInputs * PanelDot<Bits>::kWords * chunk.first * x.rows;
}

// The words of one row are written `stride` apart.
template <class T, int Bits>
void encode_chunk_rows(const Input<T>& input, const Kept& kept, const Quantized& w, const Encoded& x, int64_t c) {
  using Dot = PanelDot<Bits>;
  const Chunk& chunk = x.chunk[c];
  place_codes(kept.index, chunk, w, x.codes + 4 * chunk.first);
  int64_t rows = x.rows, room = round_up(4 * chunk.quads, kLanes);
  int64_t steps = 4 / Dot::kInputs * chunk.quads;
  int32_t* words = words_of<Bits>(x, chunk);
  for (int64_t t = 0; t < row_tiles(rows); ++t) {
    Range tile = row_tile(rows, t);
    int64_t stride = (tile.end - tile.begin) * Dot::kWords;
    int32_t rest[kRowsOfTile][32];
    uint32_t large = 0;
    for (int64_t r = tile.begin; r < tile.end; ++r) {
      float values[kChunkMany + kLanes];
      int32_t integers[kChunkMany + kLanes];
      for (int64_t k = 0; k < chunk.count; ++k)
        values[k] = kept.index ? kept.value[(chunk.entry + k) * rows + r]
                               : to_float(input.x[r * input.stride + chunk.entry + k]);
      for (int64_t k = chunk.count; k < room; ++k) values[k] = 0.0f;
      x.step[c * rows + r] = round_values<Bits>(values, chunk.count, room, integers, x.sum + c * rows + r);
      int64_t of = r - tile.begin;
      if constexpr (Bits == 4) large |= split_large(integers, room, rest[of]);
      int32_t* to = words + of * Dot::kWords;
      for (int64_t s = 0; s < steps; ++s, to += stride) Dot::words(integers + s * Dot::kInputs, to);
    }
    words += steps * stride;
    if constexpr (Bits == 4) {
      Again again = {};
      for (int64_t s = 0; s < steps; ++s) {
        if (!(large >> s * Dot::kInputs & ((1u << Dot::kInputs) - 1))) continue;
        again.step[again.count++] = (uint8_t)s;
        for (int64_t of = 0; of < tile.end - tile.begin; ++of, words += Dot::kWords)
          Dot::words(rest[of] + s * Dot::kInputs, words);
      }
      x.again[c * row_tiles(rows) + t] = again;
    }
  }
}

// words: [chunks][tiles of rows][steps, and those again][rows of the tile], as PanelDot takes them. The rest as of a
// single row.
template <class T>
Encoded encode_rows(const Input<T>& input, const Kept& kept, const Quantized& w, int threads, char* memory) {
  Encoded x = EncodedSizes(w, input.rows, panel_chunk(w, input.rows)).in(memory);
  cut_chunks(kept.index, kept.count, w, panel_chunk(w, input.rows), false, &x);
  parallel(threads_for(input.rows * kept.count, kEncodedPerThread, threads), [&](int part, int parts) {
    Range mine = share(x.chunks, 1, part, parts);
    for (int64_t c = mine.begin; c < mine.end; ++c)
      w.bits == 8 ? encode_chunk_rows<T, 8>(input, kept, w, x, c) : encode_chunk_rows<T, 4>(input, kept, w, x, c);
  });
  return x;
}

// A panel: the codes of a chunk's inputs and of the outputs of a cache line, [strips][steps][vectors], and their
// scales.
template <int Bits>
struct Panel {
  using Dot = PanelDot<Bits>;
  static constexpr int kOutputs = kLine * 8 / Bits;
  static constexpr int kBlocks = kLine / kVectorBytes, kBlockVectors = Dot::kColumnsOfBlock * Dot::kNibbles;
  static constexpr int kStrips = kBlocks * kBlockVectors / Dot::kVectors;
  static constexpr int kSteps = (Bits == 8 ? kChunkMany : 32) / Dot::kInputs;
  static constexpr int kFetched =
      kStrips < Dot::kInputs ? Dot::kInputs / kStrips : 1;  // of a step's inputs, by a strip
  Vb codes[kStrips][kSteps][Dot::kVectors];
  float scale[kOutputs], lowest[kOutputs];
};

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

// A chunk's codes of the outputs of a cache line, where they lie.
struct Lines {
  const uint8_t* const* codes;
  int64_t byte, ahead;  // ahead: of so many inputs later, the codes at the same byte are fetched
  const uint8_t* end;
};

template <int Bits, bool Whole>
DEADBAND_INLINE void split_block(const Lines& lines, int64_t input, int block, Vb* vectors) {
  Vb rows[PanelDot<Bits>::kInputs];
  for (int k = 0; k < PanelDot<Bits>::kInputs; ++k) {
    const uint8_t* p = lines.codes[input + k] + lines.byte + block * kVectorBytes;
    rows[k] = Whole ? load_bytes(p) : load_block(p, lines.end);
  }
  PanelDot<Bits>::split(rows, vectors);
}

// All of a step's codes -> panel.
template <int Bits, bool Whole>
DEADBAND_INLINE void fill_step(const Lines& lines, int64_t s, Panel<Bits>* panel) {
  using Dot = PanelDot<Bits>;
#pragma GCC unroll 16
  for (int b = 0; b < Panel<Bits>::kBlocks; ++b) {
    Vb vectors[Panel<Bits>::kBlockVectors];
    split_block<Bits, Whole>(lines, s * Dot::kInputs, b, vectors);
#pragma GCC unroll 16
    for (int v = 0; v < Panel<Bits>::kBlockVectors; ++v) {
      int n = b * Panel<Bits>::kBlockVectors + v;
      panel->codes[n / Dot::kVectors][s][n % Dot::kVectors] = vectors[v];
    }
  }
}

// The scales of outputs from `o` on. A code less 8 is what meets x: the minimum grows by as much.
template <int Bits>
void fill_scales(const Quantized& w, int64_t group, int64_t next, int64_t o, Panel<Bits>* panel) {
  if (!w.scales) return;
  const uint16_t* both[] = {w.scales, w.minimum};
  for (const uint16_t* fetched : both)
    if (fetched && next != group)
      for (int64_t k = 0; k < Panel<Bits>::kOutputs; k += 32) __builtin_prefetch(fetched + next * w.out + o + k, 0, 2);
  const uint16_t *scales = w.scales + group * w.out, *minimum = w.minimum ? w.minimum + group * w.out : nullptr;
  for (int64_t k = 0; k < Panel<Bits>::kOutputs; k += kLanes) {
    Vf scale = load_scales(scales + o + k, w.out - o - k);
    store(panel->scale + k, scale);
    if (minimum) store(panel->lowest + k, load_scales(minimum + o + k, w.out - o - k) + scale * kZero<Bits>);
  }
}

// A tile of rows, and where its sums go.
struct RowTile {
  const int32_t* words;
  const Again* again;
  const float* step;
  const int32_t* sum;
  float* sums;  // [rows of the tile][stride]
  int64_t stride;
  bool scaled, minimum;
};

// What a tile does besides: nothing, fetch the codes of later inputs, or fill the panel too. Measured on Zen 4, four
// rows of 4096 x 4096 from memory: a panel that is filled first takes 10 to 15 % longer with VNNI, and fetches that all
// come then, 5 %.
enum Duty { kMeets, kFetches, kFills };

// R rows of x meet a strip of a panel: sums += their products.
template <int Bits, int R, Duty Does>
DEADBAND_INLINE void meet_strip(int strip, const Lines& lines, int64_t steps, const RowTile& tile, const Vf* step,
                                const Vf* low, Panel<Bits>* panel) {
  using Dot = PanelDot<Bits>;
  constexpr int kShare = Panel<Bits>::kFetched;
  const uint8_t* const* later = lines.codes + lines.ahead + strip * kShare;
  const uint8_t* const* near = lines.codes;
  Vi parts[R][kRowSums];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) Dot::start(parts[r], tile.sum[r]);
  const int32_t* words = tile.words;
  for (int64_t s = 0; s < steps; ++s, words += R * Dot::kWords) {
    if constexpr (Does != kMeets)
#pragma GCC unroll 16
      for (int k = 0; k < kShare; ++k) __builtin_prefetch(later[s * Dot::kInputs + k] + lines.byte, 0, 2);
    if constexpr (Does == kFills) {
#pragma GCC unroll 16
      for (int k = 0; k < Dot::kInputs; ++k) __builtin_prefetch(*near++ + lines.byte + kNear, 0, 3);
      fill_step<Bits, true>(lines, s, panel);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) Dot::multiply(parts[r], panel->codes[strip][s], words + r * Dot::kWords);
  }
  if constexpr (Bits == 4)
    for (int n = 0; n < tile.again->count; ++n, words += R * Dot::kWords)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        Dot::multiply(parts[r], panel->codes[strip][tile.again->step[n]], words + r * Dot::kWords);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Vi totals[Dot::kOutputVectors];
    Dot::totals(parts[r], totals);
    float* sums = tile.sums + r * tile.stride;
#pragma GCC unroll 16
    for (int v = 0; v < Dot::kOutputVectors; ++v) {
      int64_t o = Dot::output(strip * Dot::kOutputVectors + v);
      Vf value = __builtin_convertvector(totals[v], Vf) * step[r];
      if (tile.scaled) value *= load(panel->scale + o);
      if (tile.minimum) value += load(panel->lowest + o) * low[r];
      store(sums + o, load(sums + o) + value);
    }
  }
}

// All strips. The first one of a tile that fills the panel takes the codes of all on their way from memory.
template <int Bits, int R, bool First>
void meet_panel(const Lines& lines, int64_t steps, RowTile tile, Panel<Bits>* panel) {
  Vf step[R], low[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    step[r] = splat(tile.step[r]);
    low[r] = splat(tile.step[r] * (float)tile.sum[r]);
  }
  int strip = 0;
  if constexpr (First) {
    meet_strip<Bits, R, kFills>(strip++, lines, steps, tile, step, low, panel);
    for (; strip < Panel<Bits>::kStrips && strip * Panel<Bits>::kFetched < PanelDot<Bits>::kInputs; ++strip)
      meet_strip<Bits, R, kFetches>(strip, lines, steps, tile, step, low, panel);
  }
  for (; strip < Panel<Bits>::kStrips; ++strip)
    meet_strip<Bits, R, kMeets>(strip, lines, steps, tile, step, low, panel);
}

template <int Bits, bool First, int R = kRowsOfTile>
DEADBAND_INLINE void meet_panel_rows(int64_t rows, const Lines& lines, int64_t steps, const RowTile& tile,
                                     Panel<Bits>* panel) {
  if constexpr (R > 1)
    if (rows < R) return meet_panel_rows<Bits, First, R - 1>(rows, lines, steps, tile, panel);
  meet_panel<Bits, R, First>(lines, steps, tile, panel);
}

// Several rows of x, outputs [begin, end): sums[rows][stride] += the product with all chunks.
template <int Bits>
void panel_outputs(const Quantized& w, const Encoded& x, Range outputs, float* sums, int64_t stride,
                   Panel<Bits>* panel) {
  using Dot = PanelDot<Bits>;
  for (int64_t c = 0; c < x.chunks; ++c) {
    const Chunk& chunk = x.chunk[c];
    int64_t steps = 4 / Dot::kInputs * chunk.quads;
    Lines lines = {x.codes + 4 * chunk.first, 0, c + 1 < x.chunks ? 4 * chunk.quads : 0, end_of(w)};
    for (int64_t o = outputs.begin; o < outputs.end; o += Panel<Bits>::kOutputs) {
      lines.byte = o * Bits / 8;
      bool whole = lines.byte + kLine <= w.row_bytes;
      for (int64_t s = 0; !whole && s < steps; ++s) fill_step<Bits, false>(lines, s, panel);
      fill_scales(w, chunk.group, x.chunk[c + 1 < x.chunks ? c + 1 : c].group, o, panel);
      const int32_t* words = words_of<Bits>(x, chunk);
      for (int64_t t = 0; t < row_tiles(x.rows); ++t) {
        Range rows = row_tile(x.rows, t);
        int64_t r = rows.begin, count = rows.end - r;
        const Again* again = x.again + c * row_tiles(x.rows) + t;
        RowTile tile = {words,
                        again,
                        x.step + c * x.rows + r,
                        x.sum + c * x.rows + r,
                        sums + r * stride + o - outputs.begin,
                        stride,
                        w.scales != nullptr,
                        w.minimum != nullptr};
        whole && !t ? meet_panel_rows<Bits, true>(count, lines, steps, tile, panel)
                    : meet_panel_rows<Bits, false>(count, lines, steps, tile, panel);
        words += (steps + (Bits == 4 ? again->count : 0)) * count * Dot::kWords;
      }
    }
  }
}

template <int Bits>
DEADBAND_INLINE int64_t panel_tile(const Quantized& w, int64_t rows) {
  constexpr int64_t kStep = kOutputStep;
  return min_of(max_of(kSumsMany / rows, 2 * kStep) / kStep * kStep, round_up(w.out, kStep));
}

// Bytes that multiply_rows takes.
template <int Bits>
DEADBAND_INLINE size_t panel_bytes(const Quantized& w, int64_t rows) {
  return sizeof(Panel<Bits>) + rows * panel_tile<Bits>(w, rows) * sizeof(float);
}

// The product, the outputs in `mine`.
template <class T, int Bits>
void multiply_rows(const Quantized& w, const Encoded& x, const Output<T>& target, Range mine, char* scratch) {
  int64_t tile = panel_tile<Bits>(w, x.rows);
  float* sums = (float*)(scratch + sizeof(Panel<Bits>));
  for (int64_t o = mine.begin; o < mine.end; o += tile) {
    Range cut = {o, min_of(o + tile, mine.end)};
    memset(sums, 0, x.rows * tile * sizeof(float));
    panel_outputs<Bits>(w, x, cut, sums, tile, (Panel<Bits>*)scratch);
    finish_rows(w, target, sums, tile, x.rows, cut);
  }
}

}  // namespace
}  // namespace deadband

#endif
