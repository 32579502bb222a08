#if defined(__aarch64__)
#include "kernel_table.h"
#include "kernels-inl.h"

namespace deadband {
extern const KernelTable kernels_aarch64_dotprod = table_of("aarch64-dotprod");
}  // namespace deadband
#endif
