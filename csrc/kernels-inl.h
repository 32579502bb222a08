// The kernels of one instruction set: a kernels_<isa>.cpp includes this and defines its table. Everything in the -inl.h
// files has internal linkage, and they use no C++ header: nothing in them can be merged with another instruction set's
// copy.
#ifndef DEADBAND_KERNELS_INL_H
#define DEADBAND_KERNELS_INL_H

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 says so of its own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "attend-inl.h"
#include "bandwidth-inl.h"
#include "dequantize-inl.h"
#include "dot-inl.h"
#include "experts-inl.h"
#include "fill-inl.h"
#include "gated_down-inl.h"
#include "gated_mlp-inl.h"
#include "gemm-inl.h"
#include "kernel_table.h"
#include "linears-inl.h"
#include "observe-inl.h"

namespace deadband {
namespace {

// 8 rows of 2048 x 2048 took 1247 us with `linears` on Zen 4, 9 rows 906 us with pairs of bfloat16.
constexpr int64_t kPairedRows = Step<bf16>::kInputs > 1 ? DEADBAND_STREAM_ROWS - 1 : DEADBAND_STREAM_ROWS;

constexpr KernelTable table_of(const char* isa) {
  return {isa,
          linears,
          gated_mlp,
          gated_down,
          experts,
          expert_mlp,
          attend,
          dot,
          gemm,
          fill,
          dequantize,
          observe,
          {DEADBAND_STREAM_ROWS, kPairedRows},
          read};
}

}  // namespace
}  // namespace deadband

#endif
