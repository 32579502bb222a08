// How fast memory can be read: what kernels are judged by. Rows are loaded, and nothing is computed of them.
#ifndef DEADBAND_BANDWIDTH_INL_H
#define DEADBAND_BANDWIDTH_INL_H

#include <stdint.h>
#include <string.h>

#include "kernel_table.h"
#include "sizes-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// The bytes in `columns` of the rows of a thread, kSide rows at a time. Those `ahead` are fetched meanwhile: of the
// same rows, and towards their ends of the next.
template <int kSide, bool kFetch>
uint64_t read_rows(const Rows& rows, Range mine, Range columns, int64_t ahead) {
  Vu seen[kSide] = {};
  const char *row[kSide], *next[kSide];
  int64_t width = columns.end - columns.begin;
  ahead = min_of(ahead, width);
  auto at = [&](int64_t i) __attribute__((always_inline)) {
    i = min_of(i, mine.end - 1);
    return (const char*)rows.data + (rows.index ? rows.index[i] : i) * rows.stride + columns.begin;
  };
  uint64_t result = 0;
  for (int64_t i = mine.begin; i < mine.end; i += kSide) {
    for (int k = 0; k < kSide; ++k) {
      row[k] = at(i + k);
      next[k] = at(i + kSide + k);
    }
    int64_t j = 0;
    auto step = [&](const char* const* from, int64_t byte) __attribute__((always_inline)) {
      for (int k = 0; k < kSide; ++k) {
        if (kFetch) __builtin_prefetch(from[k] + byte, 0, 2);
        for (int64_t v = 0; v < 64; v += kVectorBytes) {
          Vu loaded;
          memcpy(&loaded, row[k] + j + v, sizeof loaded);
          seen[k] |= loaded;
        }
      }
    };
    for (; j + 64 <= width - ahead; j += 64) step(row, j + ahead);
    for (; j + 64 <= width; j += 64) step(next, j + ahead - width);
    for (int k = 0; k < kSide; ++k)
      for (int64_t rest = j; rest < width; ++rest) result |= (uint8_t)row[k][rest];
  }
  for (int k = 0; k < kSide; ++k)
    for (int lane = 0; lane < kLanes; ++lane) result |= seen[k][lane];
  return result;
}

// Which of these is the fastest depends on the processor, on how many threads read and on how long the rows are.
struct ReadLoop {
  uint64_t (*run)(const Rows& rows, Range mine, Range columns, int64_t ahead);
  int64_t ahead;
  bool share_rows;  // among the threads, or the bytes of each row
};
constexpr int64_t kNextRows = INT64_MAX;  // ahead: the same bytes of the next rows
constexpr ReadLoop kReadLoops[] = {
    {read_rows<1, true>, 192, true},        {read_rows<1, true>, 4096, true},  {read_rows<4, true>, 512, true},
    {read_rows<4, true>, 2048, true},       {read_rows<8, true>, 1024, true},  {read_rows<8, true>, 2048, true},
    {read_rows<8, true>, 4096, true},       {read_rows<8, true>, 2048, false}, {read_rows<8, true>, kNextRows, true},
    {read_rows<8, true>, kNextRows, false}, {read_rows<16, true>, 1024, true}, {read_rows<16, false>, 0, true},
};
static_assert(sizeof kReadLoops / sizeof *kReadLoops == DEADBAND_READ_LOOPS, "kernels.h says how many there are");

// All bits of all bytes, or'ed.
uint8_t read(const Rows& rows, int loop, int threads) {
  const ReadLoop& way = kReadLoops[loop];
  uint64_t result = 0;
  parallel(threads, [&](int part, int parts) {
    Range mine = {0, rows.count}, columns = {0, rows.bytes};
    way.share_rows ? mine = share(rows.count, 1, part, parts) : columns = share(rows.bytes, 64, part, parts);
    __atomic_fetch_or(&result, way.run(rows, mine, columns, way.ahead), __ATOMIC_RELAXED);
  });
  return (uint8_t)(result | result >> 8 | result >> 16 | result >> 24);
}

}  // namespace
}  // namespace deadband

#endif
