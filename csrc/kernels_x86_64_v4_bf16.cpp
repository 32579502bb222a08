#if defined(__x86_64__)
#define DEADBAND_TABLE kernels_x86_64_v4_bf16
#define DEADBAND_ISA "x86-64-v4-bf16"
#include "kernels-inl.h"
#endif
