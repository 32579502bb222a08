#if defined(__aarch64__)
#define DEADBAND_TABLE kernels_aarch64_dotprod
#define DEADBAND_ISA "aarch64-dotprod"
#include "kernels-inl.h"
#endif
