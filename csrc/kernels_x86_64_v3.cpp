#if defined(__x86_64__)
#include "kernel_table.h"
#include "kernels-inl.h"

namespace deadband {
extern const KernelTable kernels_x86_64_v3 = table_of("x86-64-v3");
}  // namespace deadband
#endif
