// The way of one row of x through quantised weights: chunk by chunk, and along the chunk's rows of codes line by line.
//
// Half of the rows, chosen at random, come from memory at no more than 65 to 80 % of the rate of all: the processor
// itself fetches ahead where runs are long, and few. So a row is fetched kLead bytes ahead, and towards its end the
// next chunk's first lines. Measured on Zen 4 with 4 bits and half of the rows of 1 and 4 KB: leads of 2 lines take 20
// % longer, those of 4 and 8 up to 5 %, of 16 up to 15 %.
#ifndef DEADBAND_LINES_INL_H
#define DEADBAND_LINES_INL_H

#include <stdint.h>
#include <string.h>

#include "encode-inl.h"
#include "sizes-inl.h"
#include "threads-inl.h"

namespace deadband {
namespace {

constexpr int64_t kLine = 64, kLead = 6 * kLine;  // bytes

// 64 bytes of codes, copied to `line` if the codes end before. Those of the next row, which the end of a row meets, go
// to sums that nobody reads.
template <bool Whole>
DEADBAND_INLINE const uint8_t* line_at(const uint8_t* p, const uint8_t* end, uint8_t* line) {
  if (Whole || p + kLine <= end) return p;
  if (p < end) memcpy(line, p, end - p);
  return line;
}

// What is fetched while a line is multiplied: of these rows, at that byte; and of the next chunk's rows, the same line.
struct Ahead {
  const uint8_t* const* codes;
  int64_t byte;
  const uint8_t* const* next;
};

DEADBAND_INLINE void fetch_scales(const uint16_t* scales, int64_t outputs) {
  for (int64_t o = 0; o < outputs; o += 32) __builtin_prefetch(scales + o, 0, 2);
}

// The last line of the rows, of which `outputs` are left.
template <class Row>
void add_last_line(const Encoded& x, int64_t c, int64_t byte, const uint8_t* end, Ahead ahead, int64_t outputs,
                   const uint16_t* scales, const uint16_t* minimum, float* sums) {
  uint16_t parts[2][kLine * 8 / Row::kBits] = {};
  if (scales) memcpy(parts[0], scales, outputs * sizeof *scales);
  if (minimum) memcpy(parts[1], minimum, outputs * sizeof *minimum);
  Row::template add_line<false>(x, c, byte, end, ahead, scales ? parts[0] : nullptr, minimum ? parts[1] : nullptr,
                                sums);
}

// Outputs [begin, end), of which begin is that of a line: sums += the product with chunks [begin, end).
// Row::add_line adds that of one chunk and one line.
template <class Row>
void stream_lines(const Quantized& w, const Encoded& x, Range chunks, Range outputs, float* sums) {
  constexpr int64_t kOutputs = kLine * 8 / Row::kBits;
  const uint8_t* end = end_of(w);
  int64_t width = (outputs.end - outputs.begin + kOutputs - 1) / kOutputs * kLine;
  for (int64_t c = chunks.begin; c < chunks.end; ++c) {
    int64_t next = c + 1 < chunks.end ? c + 1 : c;
    int64_t scale = x.chunk[c].group * w.out, next_scale = x.chunk[next].group * w.out;
    for (int64_t line = 0; line < width; line += kLine) {
      int64_t o = outputs.begin + line * 8 / Row::kBits, byte = o * Row::kBits / 8;
      int64_t lead = line + kLead, later = min_of(c + lead / width, chunks.end - 1);
      Ahead ahead = {x.codes + 4 * x.chunk[later].first, byte - line + lead % width, x.codes + 4 * x.chunk[next].first};
      const uint16_t* scales = w.scales ? w.scales + scale + o : nullptr;
      const uint16_t* minimum = w.minimum ? w.minimum + scale + o : nullptr;
      if (scale != next_scale) {
        fetch_scales(w.scales + next_scale + o, kOutputs);
        if (minimum) fetch_scales(w.minimum + next_scale + o, kOutputs);
      }
      float* own = sums + line * 8 / Row::kBits;
      if (o + kOutputs <= w.out)
        Row::template add_line<true>(x, c, byte, end, ahead, scales, minimum, own);
      else
        add_last_line<Row>(x, c, byte, end, ahead, w.out - o, scales, minimum, own);
    }
  }
}

}  // namespace
}  // namespace deadband

#endif
