// The kernels of one instruction set. A kernels_<isa>.cpp defines DEADBAND_TABLE and DEADBAND_ISA and includes this
// once. Everything has internal linkage, and no C++ header is used: nothing here can be merged with another instruction
// set's copy.
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernel_table.h"

namespace deadband {
namespace {

#include "vector-inl.h"  // first: the others use it

#include "dot-inl.h"
#include "gemm-inl.h"
#include "observe-inl.h"
#include "stream-inl.h"

}  // namespace

extern const KernelTable DEADBAND_TABLE = {DEADBAND_ISA, stream, dot, gemm, observe, read};

}  // namespace deadband
