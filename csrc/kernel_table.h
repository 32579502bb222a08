// What the translation units of the instruction sets share with dispatch.cpp: declarations only. An inline function
// here would be compiled once per instruction set and the linker might keep the AVX-512 copy for everyone.
#ifndef DEADBAND_KERNEL_TABLE_H
#define DEADBAND_KERNEL_TABLE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace deadband {

// What decides whether an entry is kept: kernels.h explains it. threshold == nullptr: everything is.
struct Rule {
  const float* threshold;
  const float* scale;
  const float* center;
  bool relative;
};

// A weight of 8 or 4 bits: kernels.h explains it.
struct Quantized {
  int bits;
  const uint8_t* codes;              // [in][row_bytes]
  const uint16_t *scales, *minimum;  // [groups][out] float16, or nullptr
  const float* channel_scales;       // [out] where there are no groups, else nullptr
  int64_t group_size, row_bytes, in, out;
};

// One instruction set's kernels. dispatch.cpp has checked their arguments, and no size is zero except `in` and `cols`.
struct KernelTable {
  const char* name;
  int (*stream)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
                int64_t weight_stride, int64_t out, const void* bias, const float* offset, const Rule& rule, void* y,
                int threads, int64_t* counts);
  int (*dot)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
             int64_t weight_stride, int64_t out, const void* bias, void* y, int threads);
  int (*gemm)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
              int64_t weight_stride, int64_t out, const void* bias, void* y, int threads);
  int (*quantized)(int dtype, const void* x, int64_t rows, int64_t x_stride, const Quantized& weight, const void* bias,
                   const float* offset, const Rule& rule, void* y, int threads, int64_t* counts);
  int (*observe)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t cols, const float* scale,
                 int64_t* histogram, double* sum, double* sum_of_squares, int threads);
  uint64_t (*read)(const void* data, int64_t bytes, int threads);
};

#if defined(__x86_64__)
extern const KernelTable kernels_x86_64_v3, kernels_x86_64_v3_vnni, kernels_x86_64_v4, kernels_x86_64_v4_vnni,
    kernels_x86_64_v4_bf16;
#elif defined(__aarch64__)
extern const KernelTable kernels_aarch64_dotprod;
#endif
extern const KernelTable kernels_baseline;

// Scratch memory of the calling thread, aligned to 64 bytes, kept for its next call; nullptr when there is none.
// A later call with the same slot gives the same memory, perhaps moved: contents do not survive.
enum WorkspaceSlot { kSharedSlot, kPrivateSlot, kSlots };
void* workspace(WorkspaceSlot slot, size_t bytes);

}  // namespace deadband

#endif
