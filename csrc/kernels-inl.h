// The kernels of one instruction set. A kernels_<isa>.cpp defines DEADBAND_TABLE and DEADBAND_ISA and includes this
// once. Everything has internal linkage, and no C++ header is used: nothing here can be merged with another instruction
// set's copy.
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernel_table.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 says so of its own AVX-512 intrinsics
#endif

namespace deadband {
namespace {

#include "vector-inl.h"  // first: the others use it

#include "bytes-inl.h"
#include "dot-inl.h"
#include "gemm-inl.h"
#include "observe-inl.h"
#include "stream-inl.h"
// after those
#include "quantized-inl.h"
// and after that
#include "linears-inl.h"
// and after that
#include "attend-inl.h"

}  // namespace

extern const KernelTable DEADBAND_TABLE = {DEADBAND_ISA, linears, gated_mlp, attend, dot, gemm, observe, read};

}  // namespace deadband
