#if defined(__x86_64__)
#define DEADBAND_TABLE kernels_x86_64_v3_vnni
#define DEADBAND_ISA "x86-64-v3-vnni"
#include "kernels-inl.h"
#endif
