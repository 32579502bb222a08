// The exported functions: check the arguments, choose the instruction set, call its kernel.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__linux__) && !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25  // Linux 6.1; the C library here may be older than the kernel that runs
#endif
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernel_table.h"

namespace deadband {
namespace {

// Freed when its thread ends. Through a pthread key: a C++ destructor would bring in the C++ runtime library.
struct Workspaces {
  void* data[kSlots];
  size_t bytes[kSlots];
};
__thread Workspaces workspaces;
pthread_key_t workspaces_key;
pthread_once_t workspaces_once = PTHREAD_ONCE_INIT;

void free_workspaces(void* own) {
  for (void* p : ((Workspaces*)own)->data) free(p);
}
void make_workspaces_key() { pthread_key_create(&workspaces_key, free_workspaces); }

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
#endif

bool supported(const KernelTable* table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
            __builtin_cpu_supports("bmi2") && has_f16c();
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
  if (table == &kernels_x86_64_v3) return v3;
  if (table == &kernels_x86_64_v3_vnni) return v3 && has_avx_vnni();
  if (table == &kernels_x86_64_v4) return v4;
  bool vnni = v4 && __builtin_cpu_supports("avx512vnni");
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

const KernelTable* kernels() { return __atomic_load_n(&choice.table, __ATOMIC_RELAXED); }

// Sizes whose products overflow are refused with those that are negative.
constexpr int64_t kLargest = INT32_MAX;
bool is_size(int64_t size) { return size >= 0 && size <= kLargest; }

// Both linear functions.
int check_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
                 int64_t weight_stride, int64_t runs, int64_t run, const void* y, int64_t out) {
  if (dtype != DEADBAND_FLOAT32 && dtype != DEADBAND_BFLOAT16) return DEADBAND_BAD_DTYPE;
  if (!is_size(rows) || !is_size(in) || !is_size(out)) return DEADBAND_BAD_SIZE;
  if ((rows > 1 && x_stride < in) || (runs > 1 && weight_stride < run)) return DEADBAND_BAD_SIZE;
  if (rows && out && (!y || (in && (!x || !weight)))) return DEADBAND_BAD_POINTER;
  return 0;
}

int64_t row_bytes_of(const deadband_layer& layer) { return layer.bits == 8 ? layer.out : (layer.out + 31) / 32 * 16; }

int check_layer(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer& layer,
                const void* y) {
  if (layer.bits != 0 && layer.bits != 8 && layer.bits != 4) return DEADBAND_BAD_DTYPE;
  if (!is_size(layer.out)) return DEADBAND_BAD_SIZE;
  int64_t run = layer.bits ? row_bytes_of(layer) : layer.out;
  if (int error = check_linear(dtype, x, rows, x_stride, in, layer.weight, layer.bits ? run : layer.weight_stride, in,
                               run, y, layer.out))
    return error;
  if (layer.group_size < 0 || (layer.threshold && rows > DEADBAND_STREAM_ROWS)) return DEADBAND_BAD_SIZE;
  if (!layer.center != !layer.offset) return DEADBAND_BAD_POINTER;
  if (layer.bits && ((in && layer.out && !layer.scales) || (layer.minimum && (layer.bits == 8 || !layer.group_size))))
    return DEADBAND_BAD_POINTER;
  return 0;
}

}  // namespace

void* workspace(WorkspaceSlot slot, size_t bytes) {
  Workspaces& own = workspaces;
  if (!own.data[slot] || own.bytes[slot] < bytes) {
    pthread_once(&workspaces_once, make_workspaces_key);
    pthread_setspecific(workspaces_key, &own);
    free(own.data[slot]);
    own.bytes[slot] = 0;
    size_t grown = (bytes + bytes / 4 + 4096) & ~(size_t)4095;
    if (posix_memalign(&own.data[slot], 64, grown)) return own.data[slot] = nullptr;
    own.bytes[slot] = grown;
  }
  return own.data[slot];
}

}  // namespace deadband

using namespace deadband;

int deadband_linears(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers,
                     int count, void* y, int threads) {
  if (rows > DEADBAND_STREAM_ROWS || count < 0) return DEADBAND_BAD_SIZE;
  if (count && !layers) return DEADBAND_BAD_POINTER;
  for (int l = 0; l < count; ++l)
    if (int error = check_layer(dtype, x, rows, x_stride, in, layers[l], y)) return error;
  if (!rows || !count) return 0;
  return kernels()->linears(dtype, x, rows, x_stride, in, layers, count, y, threads < 1 ? 1 : threads);
}

int deadband_gated_mlp(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                       const deadband_layer* layers, int activation, void* y, int threads) {
  if (rows > DEADBAND_STREAM_ROWS) return DEADBAND_BAD_SIZE;
  if (activation != DEADBAND_SILU && activation != DEADBAND_GELU_TANH) return DEADBAND_BAD_DTYPE;
  if (!layers) return DEADBAND_BAD_POINTER;
  for (int l = 0; l < 3; ++l) {
    // what is between the layers is memory of the kernel's own
    const void* from = l < 2 ? x : (const void*)layers;
    int64_t inputs = l < 2 ? in : layers[0].out, stride = l < 2 ? x_stride : inputs;
    if (int error = check_layer(dtype, from, rows, stride, inputs, layers[l], l < 2 ? layers : y)) return error;
  }
  if (layers[0].out != layers[1].out) return DEADBAND_BAD_SIZE;
  if (!rows) return 0;
  return kernels()->gated_mlp(dtype, x, rows, x_stride, in, layers, activation, y, threads < 1 ? 1 : threads);
}

int deadband_sparse_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
                           int64_t weight_stride, int64_t out, const void* bias, const float* threshold,
                           const float* scale, const float* center, const float* offset, int relative, void* y,
                           int threads, int64_t* counts) {
  if (!threshold) return DEADBAND_BAD_POINTER;
  deadband_layer layer = {0,    out,       weight, weight_stride, nullptr, nullptr,  0,
                          bias, threshold, scale,  center,        offset,  relative, counts};
  return deadband_linears(dtype, x, rows, x_stride, in, &layer, 1, y, threads);
}

int deadband_dense_linear(int dtype, int layout, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                          const void* weight, int64_t weight_stride, int64_t out, const void* bias, void* y,
                          int threads) {
  if (layout != 0 && layout != 1) return DEADBAND_BAD_DTYPE;
  if (int error = check_linear(dtype, x, rows, x_stride, in, weight, weight_stride, layout ? out : in,
                               layout ? in : out, y, out))
    return error;
  if (layout == 1 && rows > DEADBAND_DOT_ROWS) return DEADBAND_BAD_SIZE;
  if (!rows || !out) return 0;
  if (threads < 1) threads = 1;
  if (layout == 1) return kernels()->dot(dtype, x, rows, x_stride, in, weight, weight_stride, out, bias, y, threads);
  deadband_layer layer = {};
  layer.out = out;
  layer.weight = weight;
  layer.weight_stride = weight_stride;
  layer.bias = bias;
  if (rows <= DEADBAND_STREAM_ROWS) return kernels()->linears(dtype, x, rows, x_stride, in, &layer, 1, y, threads);
  return kernels()->gemm(dtype, x, rows, x_stride, in, weight, weight_stride, out, bias, y, threads);
}

int deadband_quantized_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, int bits,
                              const void* codes, const void* scales, const void* minimum, int64_t group_size,
                              int64_t out, const void* bias, const float* threshold, const float* scale,
                              const float* center, const float* offset, int relative, void* y, int threads,
                              int64_t* counts) {
  if (bits != 8 && bits != 4) return DEADBAND_BAD_DTYPE;
  deadband_layer layer = {bits, out,       codes, 0,      scales, minimum,  group_size,
                          bias, threshold, scale, center, offset, relative, counts};
  if (int error = check_layer(dtype, x, rows, x_stride, in, layer, y)) return error;
  if (!rows || !out) return 0;
  return kernels()->linears(dtype, x, rows, x_stride, in, &layer, 1, y, threads < 1 ? 1 : threads);
}

int deadband_attend(int dtype, const void* query, const void* keys, const void* values, int64_t groups, int64_t heads,
                    int64_t size, int64_t value_size, int64_t tokens, int64_t key_group, int64_t key_stride,
                    int64_t value_group, int64_t value_stride, const float* mask, float scaling, float softcap, void* y,
                    int threads) {
  if (dtype != DEADBAND_FLOAT32 && dtype != DEADBAND_BFLOAT16) return DEADBAND_BAD_DTYPE;
  if (!is_size(groups) || !is_size(heads) || !is_size(size) || !is_size(value_size) || !is_size(tokens) ||
      !is_size(groups * heads))
    return DEADBAND_BAD_SIZE;
  if ((size > 1 && key_stride < tokens) || (tokens > 1 && value_stride < value_size)) return DEADBAND_BAD_SIZE;
  if (!groups || !heads || !value_size) return 0;
  if (!y || (tokens && (!values || !mask || (size && (!query || !keys))))) return DEADBAND_BAD_POINTER;
  if (!tokens) {
    memset(y, 0, (size_t)(groups * heads * value_size) * (dtype == DEADBAND_FLOAT32 ? 4 : 2));
    return 0;
  }
  return kernels()->attend(dtype, query, keys, values, groups, heads, size, value_size, tokens, key_group, key_stride,
                           value_group, value_stride, mask, scaling, softcap, y, threads < 1 ? 1 : threads);
}

int deadband_observe(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t cols, const float* scale,
                     int64_t* histogram, double* sum, double* sum_of_squares, int threads) {
  if (dtype < DEADBAND_FLOAT32 || dtype > DEADBAND_FLOAT16) return DEADBAND_BAD_DTYPE;
  if (rows < 0 || cols < 0 || (rows > 1 && x_stride < cols)) return DEADBAND_BAD_SIZE;
  if (!rows || !cols) return 0;
  if (!x || !histogram || !sum || !sum_of_squares) return DEADBAND_BAD_POINTER;
  return kernels()->observe(dtype, x, rows, x_stride, cols, scale, histogram, sum, sum_of_squares,
                            threads < 1 ? 1 : threads);
}

double deadband_read_bandwidth(const void* data, int64_t bytes, int threads) {
  if (!data || bytes <= 0) return 0;
  timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  kernels()->read(data, bytes, threads < 1 ? 1 : threads);
  clock_gettime(CLOCK_MONOTONIC, &end);
  return (double)bytes / ((double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec));
}

int deadband_advise_huge(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1);
  uintptr_t end = ((uintptr_t)data + (bytes > 0 ? (uintptr_t)bytes : 0)) & ~(page - 1);
  if (data && begin < end) {
    int taken = madvise((void*)begin, end - begin, MADV_HUGEPAGE) == 0;
#ifdef MADV_COLLAPSE
    // Memory that malloc hands out again has its small pages already; newer Linux joins those on request.
    const uintptr_t huge = 2 << 20;
    begin = (begin + huge - 1) & ~(huge - 1);
    end &= ~(huge - 1);
    if (taken && begin < end) madvise((void*)begin, end - begin, MADV_COLLAPSE);
#endif
    return taken;
  }
#endif
  return 0;
}

const char* deadband_isa(void) { return kernels()->name; }

const char* deadband_isa_list(void) { return choice.list; }

int deadband_set_isa(const char* name) {
  const KernelTable* table = find(name);
  if (!table) return DEADBAND_BAD_ISA;
  __atomic_store_n(&choice.table, table, __ATOMIC_RELAXED);
  return 0;
}
