// What every CPU of this architecture can run: SSE2 on x86-64, NEON on aarch64.
#define DEADBAND_TABLE kernels_baseline
#if defined(__aarch64__)
#define DEADBAND_ISA "aarch64"
#else
#define DEADBAND_ISA "baseline"
#endif
#include "kernels-inl.h"
