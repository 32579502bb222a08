#if defined(__x86_64__)
#define DEADBAND_TABLE kernels_x86_64_v4
#define DEADBAND_ISA "x86-64-v4"
#include "kernels-inl.h"
#endif
