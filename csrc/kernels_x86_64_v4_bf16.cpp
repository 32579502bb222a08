#if defined(__x86_64__)
#include "kernel_table.h"
#include "kernels-inl.h"

namespace deadband {
extern const KernelTable kernels_x86_64_v4_bf16 = table_of("x86-64-v4-bf16");
}  // namespace deadband
#endif
