// The quantised product of quantized-inl.h for several rows of x: a chunk's weights of some columns are interleaved
// once, into a panel in the first-level cache, and the rows meet it there, kPanelTile at a time.
#ifndef DEADBAND_PANELS_INL_H
#define DEADBAND_PANELS_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes-inl.h"
#include "encode-inl.h"
#include "quantized-inl.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

constexpr int64_t kSumsMany = 32768;             // sums of a tile of outputs: they stay in the second-level cache
constexpr int64_t kQuantizedRows = 256;          // rows of x that are encoded at a time
constexpr int kPanelTile = kParts == 2 ? 3 : 6;  // rows whose sums fit the registers, 4 * kParts vectors each

// A chunk's weights of one block, interleaved: [quads][4], of nibbles the lower ones and then the upper.
template <int Bits>
DEADBAND_INLINE void fill_panel(const uint8_t* const* codes, int64_t byte, const uint8_t* end, int64_t quads,
                                int64_t ahead, Vb* panel) {
  for (int64_t q = 0; q < quads; ++q, codes += 4) {
    Vb rows[4], columns[4];
    for (int k = 0; k < 4; ++k) {
      __builtin_prefetch(codes[ahead + k] + byte, 0, 2);
      __builtin_prefetch(codes[k] + byte + kNear, 0, 3);
      rows[k] = load_block(codes[k] + byte, end);
    }
    interleave(rows, columns);
    for (int c = 0; c < 4; ++c) {
      if constexpr (Bits == 8)
        panel[4 * q + c] = from_signed(columns[c]);
      else {
        panel[4 * q + c] = columns[c] & 15;
        panel[4 * (kChunkMany / 4 + q) + c] = (Vb)((Vu)columns[c] >> 4) & 15;
      }
    }
  }
}

// R rows of x meet a panel. sums: [R][sums_stride].
template <int Bits, bool Upper, int R>
void multiply_panel(const Vb* panel, const Chunk& chunk, const int32_t* words, const float* step, const int32_t* sum,
                    const uint16_t* scales, const uint16_t* minimum, int64_t left, float* sums, int64_t sums_stride) {
  Vi parts[R][4][kParts] = {};
  for (int64_t q = 0; q < chunk.quads; ++q)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 4; ++c)
        multiply_add(parts[r][c], panel[4 * q + c], words + 2 * chunk.quads * r + q, chunk.quads);
  for (int r = 0; r < R; ++r) {
    Vi totals[4];
    for (int c = 0; c < 4; ++c) totals[c] = total(parts[r][c]);
    flush<Bits, Upper, false>(totals, step[r], sum[r], scales, minimum, left, sums + r * sums_stride);
  }
}

template <int Bits, bool Upper, int R = kPanelTile, class... Rest>
DEADBAND_INLINE void multiply_panel_rows(int64_t count, const Vb* panel, Rest... rest) {
  if constexpr (R > 1)
    if (count < R) return multiply_panel_rows<Bits, Upper, R - 1>(count, panel, rest...);
  multiply_panel<Bits, Upper, R>(panel, rest...);
}

// Several rows of x, outputs [begin, end): sums[rows][stride] += the product with all chunks.
template <int Bits>
void panel_outputs(const Quantized& w, const Encoded& x, Range outputs, float* sums, int64_t stride, Vb* panel) {
  for (int64_t c = 0; c < x.chunks; ++c) {
    const Chunk& chunk = x.chunk[c];
    int64_t ahead = c + 1 < x.chunks ? 4 * chunk.quads : 0;
    for (int64_t o = outputs.begin; o < outputs.end; o += kOutputs<Bits>) {
      const uint16_t* scales = w.scales ? w.scales + chunk.group * w.out + o : nullptr;
      const uint16_t* minimum = w.minimum ? w.minimum + chunk.group * w.out + o : nullptr;
      fill_panel<Bits>(x.codes + 4 * chunk.first, o * Bits / 8, end_of(w), chunk.quads, ahead, panel);
      for (int64_t r = 0; r < x.rows; r += kPanelTile) {
        const int32_t* words = x.words + 2 * (chunk.first * x.rows + chunk.quads * r);
        const float* step = x.step + c * x.rows + r;
        const int32_t* sum = x.sum + c * x.rows + r;
        float* own = sums + r * stride + o - outputs.begin;
        multiply_panel_rows<Bits, false>(x.rows - r, panel, chunk, words, step, sum, scales, minimum, w.out - o, own,
                                         stride);
        if constexpr (Bits == 4)
          multiply_panel_rows<Bits, true>(x.rows - r, panel + kChunkMany, chunk, words, step, sum, scales, minimum,
                                          w.out - o, own, stride);
      }
    }
  }
}

template <int Bits>
DEADBAND_INLINE int64_t panel_tile(const Quantized& w, int64_t rows) {
  constexpr int64_t kStep = kOutputStep<Bits>;
  return min_of(max_of(kSumsMany / rows, 2 * kStep) / kStep * kStep, round_up(w.out, kStep));
}
constexpr size_t kPanelBytes = 2 * kChunkMany * kVectorBytes;

// Bytes that panel_share takes.
template <int Bits>
DEADBAND_INLINE size_t panel_bytes(const Quantized& w, int64_t rows) {
  return kPanelBytes + rows * panel_tile<Bits>(w, rows) * sizeof(float);
}

// One thread's share of the product.
template <class T, int Bits>
void panel_share(const Quantized& w, const Encoded& x, const Output<T>& target, int part, int parts, char* scratch) {
  Range mine = share(w.out, kOutputStep<Bits>, part, parts);
  int64_t tile = panel_tile<Bits>(w, x.rows);
  float* sums = (float*)(scratch + kPanelBytes);
  for (int64_t o = mine.begin; o < mine.end; o += tile) {
    Range cut = {o, min_of(o + tile, mine.end)};
    memset(sums, 0, x.rows * tile * sizeof(float));
    panel_outputs<Bits>(w, x, cut, sums, tile, (Vb*)scratch);
    finish_rows(w, target, sums, tile, x.rows, cut);
  }
}

}  // namespace
}  // namespace deadband

#endif
