// Arithmetic of sizes, and the one word that the kernels mark their functions with.
#ifndef DEADBAND_SIZES_INL_H
#define DEADBAND_SIZES_INL_H

#include <stdint.h>

namespace deadband {
namespace {

#define DEADBAND_INLINE inline __attribute__((always_inline))

DEADBAND_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
DEADBAND_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
DEADBAND_INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace
}  // namespace deadband

#endif
