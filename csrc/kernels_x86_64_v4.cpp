#if defined(__x86_64__)
#include "kernel_table.h"
#include "kernels-inl.h"

namespace deadband {
extern const KernelTable kernels_x86_64_v4 = table_of("x86-64-v4");
}  // namespace deadband
#endif
