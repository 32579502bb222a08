// What every CPU of this architecture can run: SSE2 on x86-64, NEON on aarch64.
#include "kernel_table.h"
#include "kernels-inl.h"

namespace deadband {
#if defined(__aarch64__)
extern const KernelTable kernels_baseline = table_of("aarch64");
#else
extern const KernelTable kernels_baseline = table_of("baseline");
#endif
}  // namespace deadband
