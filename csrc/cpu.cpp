// The instruction sets: which of them this CPU can run, and which is in use.
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernel_table.h"
#include "kernels.h"

namespace deadband {
namespace {

// From the least to the best.
const KernelTable* const kTables[] = {
    &kernels_baseline,
#if defined(__x86_64__)
    &kernels_x86_64_v3, &kernels_x86_64_v3_vnni, &kernels_x86_64_v4, &kernels_x86_64_v4_vnni, &kernels_x86_64_v4_bf16,
#elif defined(__aarch64__)
    &kernels_aarch64_dotprod,
#endif
};

#if defined(__x86_64__)
// What gcc 12's __builtin_cpu_supports has no name for.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && has_f16c();
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool supported(const KernelTable* table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (table == &kernels_x86_64_v3) return has_v3();
  if (table == &kernels_x86_64_v3_vnni) return has_v3() && has_avx_vnni();
  if (table == &kernels_x86_64_v4) return has_v4();
  bool vnni = has_v4() && __builtin_cpu_supports("avx512vnni");
  if (table == &kernels_x86_64_v4_vnni) return vnni;
  if (table == &kernels_x86_64_v4_bf16) return vnni && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (table == &kernels_aarch64_dotprod) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
  return table == &kernels_baseline;
}

// Supported is not always faster: Intel's vdpbf16ps does half the work of its float32 multiply-adds (gemm-inl.h has the
// figures), since bfloat16 is meant for AMX there. AMD's does twice the work.
bool suits(const KernelTable* table) {
#if defined(__x86_64__)
  if (table == &kernels_x86_64_v4_bf16) return __builtin_cpu_is("amd");
#endif
  (void)table;
  return true;
}

const KernelTable* find(const char* name) {
  if (name)
    for (const KernelTable* table : kTables)
      if (!strcmp(table->name, name) && supported(table)) return table;
  return nullptr;
}

struct Choice {
  const KernelTable* table = &kernels_baseline;
  char list[128] = "";

  Choice() {
    for (const KernelTable* candidate : kTables)
      if (supported(candidate)) {
        if (list[0]) strcat(list, ",");
        strcat(list, candidate->name);
        if (suits(candidate)) table = candidate;
      }
    if (const KernelTable* forced = find(getenv("DEADBAND_ISA"))) table = forced;
  }
};
Choice choice;

}  // namespace

const KernelTable* kernels() { return __atomic_load_n(&choice.table, __ATOMIC_RELAXED); }

}  // namespace deadband

using namespace deadband;

const char* deadband_isa(void) { return kernels()->name; }

const char* deadband_isa_list(void) { return choice.list; }

int deadband_set_isa(const char* name) {
  const KernelTable* table = find(name);
  if (!table) return DEADBAND_BAD_ISA;
  __atomic_store_n(&choice.table, table, __ATOMIC_RELAXED);
  return 0;
}
