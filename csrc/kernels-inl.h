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
#include "dot-inl.h"
#include "gated_mlp-inl.h"
#include "gemm-inl.h"
#include "kernel_table.h"
#include "linears-inl.h"
#include "observe-inl.h"

namespace deadband {
namespace {

constexpr KernelTable table_of(const char* isa) { return {isa, linears, gated_mlp, attend, dot, gemm, observe, read}; }

}  // namespace
}  // namespace deadband

#endif
