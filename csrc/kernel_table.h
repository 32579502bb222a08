// What the translation units of the instruction sets share with the others: declarations only. An inline function here
// would be compiled once per instruction set and the linker might keep the AVX-512 copy for everyone.
#ifndef DEADBAND_KERNEL_TABLE_H
#define DEADBAND_KERNEL_TABLE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace deadband {

// Rows of so many bytes: those that `index` names, or where it is nullptr the first.
struct Rows {
  const void* data;
  int64_t stride, bytes;
  const int32_t* index;
  int64_t count;
};

// One instruction set's kernels. dispatch.cpp has checked their arguments, and no size is zero except `in` and `cols`.
struct KernelTable {
  const char* name;
  int (*linears)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers,
                 int count, void* y, int threads);
  int (*gated_mlp)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers,
                   int activation, void* y, int threads);
  int (*gated_down)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* gate,
                    const deadband_layer* layers, int count, void* y, int threads);
  int (*experts)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const int64_t* experts,
                 const deadband_layer& first, const deadband_expert_strides& strides, void* y, int threads);
  int (*expert_mlp)(int dtype, const void* x, int64_t tokens, int64_t x_stride, int64_t in, const int64_t* experts,
                    int64_t each, const deadband_layer* layers, const deadband_expert_strides* strides, int activation,
                    const float* weights, void* y, int threads);
  int (*attend)(int dtype, const void* query, const void* keys, const void* values, int64_t groups, int64_t heads,
                int64_t size, int64_t value_size, int64_t tokens, int64_t key_group, int64_t key_stride,
                int64_t value_group, int64_t value_stride, const float* mask, float scaling, float softcap, void* y,
                int threads);
  int (*dot)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
             int64_t weight_stride, int64_t out, const void* bias, void* y, int threads);
  int (*gemm)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
              int64_t weight_stride, int64_t out, const void* bias, void* y, int threads);
  void (*fill)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer& layer,
               void* y, uint8_t* keep, int threads);
  void (*dequantize)(int dtype, int bits, const void* codes, const void* scales, const void* minimum,
                     int64_t group_size, int64_t in, int64_t out, void* y, int threads);
  int (*observe)(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t cols, const float* scale,
                 int64_t* histogram, double* sum, double* sum_of_squares, int threads);
  int64_t stream_rows[2];  // by dtype: the most rows whose dense product is `linears`, which streams the weights
  uint8_t (*read)(const Rows& rows, int loop, int threads);
};

#if defined(__x86_64__)
extern const KernelTable kernels_x86_64_v3, kernels_x86_64_v3_vnni, kernels_x86_64_v4, kernels_x86_64_v4_vnni,
    kernels_x86_64_v4_bf16;
#elif defined(__aarch64__)
extern const KernelTable kernels_aarch64_dotprod;
#endif
extern const KernelTable kernels_baseline;

const KernelTable* kernels();  // of the instruction set in use

// Scratch memory of the calling thread, aligned to 64 bytes, kept for its next call; nullptr when there is none.
// A later call with the same slot gives the same memory, perhaps moved: contents do not survive.
enum WorkspaceSlot { kSharedSlot, kPrivateSlot, kProductSlot, kExpertsSlot, kSlots };
void* workspace(WorkspaceSlot slot, size_t bytes);

}  // namespace deadband

#endif
