// Calls the kernels with arguments from a file: tests/test_aarch64.py writes it, runs this in an emulator and compares.
//
// aarch64_driver: prints the instruction sets that can run. aarch64_driver ISA CALLS RESULTS: with one of them, what
// every call wrote. A call is int64[kNumbers], then x, eight operands for each of two layers and three more, each its
// bytes' number (-1: NULL) and the bytes.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../csrc/kernels.h"

namespace {

enum Number {
  kKind,
  kDtype,
  kRows,
  kIn,
  kOut,
  kForm,
  kGroupSize,
  kRelative,
  kThreads,
  kResultBytes,
  kInner,
  kCount,
  kEach,
  kNumbers
};
enum Kind { kSparse, kDense, kQuantized, kObserve, kAttend, kExpertLinear, kExpertMlp, kGatedDown };

void require(bool fine, const char* what) {
  if (fine) return;
  fprintf(stderr, "%s\n", what);
  exit(1);
}

// Memory that ends where a page begins that may not be touched.
char* before_a_wall(int64_t bytes) {
  int64_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  char* p = (char*)mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(p != MAP_FAILED && !mprotect(p + size, page, PROT_NONE), "no memory");
  return p + size - bytes;
}

bool read_all(FILE* file, void* to, int64_t bytes) { return fread(to, 1, bytes, file) == (size_t)bytes; }

template <class T>
T* read_operand(FILE* file) {
  int64_t bytes;
  require(read_all(file, &bytes, sizeof bytes), "operand is missing");
  if (bytes < 0) return nullptr;
  char* data = before_a_wall(bytes);
  require(read_all(file, data, bytes), "operand is cut off");
  return (T*)data;
}

struct Operands {
  void *weight, *scales, *minimum, *bias;
  float *threshold, *scale, *center, *offset;
};

Operands read_layer(FILE* file) {
  void *weight = read_operand<void>(file), *scales = read_operand<void>(file), *minimum = read_operand<void>(file);
  void* bias = read_operand<void>(file);
  float *threshold = read_operand<float>(file), *scale = read_operand<float>(file);
  float *center = read_operand<float>(file), *offset = read_operand<float>(file);
  return {weight, scales, minimum, bias, threshold, scale, center, offset};
}

deadband_layer layer_of(const int64_t* n, const Operands& o, int64_t out, int64_t stride, int64_t* counts) {
  return {n[kForm], out,      o.weight, n[kForm] ? 0 : stride, o.scales, o.minimum, n[kGroupSize], o.bias, o.threshold,
          o.scale,  o.center, o.offset, n[kRelative],          counts};
}

// Experts lie one after the other.
deadband_expert_strides strides_of(const int64_t* n, int64_t in, int64_t out) {
  int64_t bits = n[kForm], size = n[kDtype] ? 2 : 4, group = n[kGroupSize];
  int64_t row = bits == 4 ? (out + 31) / 32 * 16 : bits == 8 ? out : out * size;
  int64_t scales = group ? (in + group - 1) / group * out * 2 : out * 4;  // float16 in groups, else float32
  return {in * row, scales, scales, out * size, out * 4};
}

int call(const int64_t* n, FILE* file, char* result, int64_t* counts) {
  void* x = read_operand<void>(file);
  Operands first = read_layer(file), second = read_layer(file);
  int64_t* experts = read_operand<int64_t>(file);
  float* shares = read_operand<float>(file);
  void* gate = read_operand<void>(file);
  int dtype = (int)n[kDtype], form = (int)n[kForm], relative = (int)n[kRelative], threads = (int)n[kThreads];
  int64_t rows = n[kRows], in = n[kIn], out = n[kOut], inner = n[kInner], each = n[kEach];
  switch (n[kKind]) {
    case kSparse:
      return deadband_sparse_linear(dtype, x, rows, in, in, first.weight, out, out, first.bias, first.threshold,
                                    first.scale, first.center, first.offset, relative, result, threads, counts);
    case kDense:
      return deadband_dense_linear(dtype, form, x, rows, in, in, first.weight, form ? in : out, out, first.bias, result,
                                   threads);
    case kQuantized:
      return deadband_quantized_linear(dtype, x, rows, in, in, form, first.weight, first.scales, first.minimum,
                                       n[kGroupSize], out, first.bias, first.threshold, first.scale, first.center,
                                       first.offset, relative, result, threads, counts);
    case kAttend: {  // rows: heads; in and out: of a head; group_size: groups; form: tokens; threshold: the mask
      int64_t groups = n[kGroupSize], tokens = n[kForm];
      return deadband_attend(dtype, x, first.weight, first.scales, groups, rows / groups, in, out, tokens, in * tokens,
                             tokens, tokens * out, out, first.threshold, 0.5f, 0, result, threads);
    }
    case kExpertLinear: {
      deadband_layer layer = layer_of(n, first, out, out, counts);
      deadband_expert_strides strides = strides_of(n, in, out);
      return deadband_expert_linear(dtype, x, rows, in, in, experts, n[kCount], &layer, &strides, result, threads);
    }
    case kExpertMlp: {
      deadband_layer layers[] = {layer_of(n, first, 2 * inner, 2 * inner, counts),
                                 layer_of(n, second, out, out, nullptr)};
      deadband_expert_strides strides[] = {strides_of(n, in, 2 * inner), strides_of(n, inner, out)};
      return deadband_expert_mlp(dtype, x, rows, in, in, experts, each, n[kCount], layers, strides, DEADBAND_SILU,
                                 shares, result, threads);
    }
    case kGatedDown: {  // the first layer lies by output
      deadband_layer layers[] = {layer_of(n, first, inner, in, counts), layer_of(n, second, out, out, nullptr)};
      return deadband_gated_down(dtype, x, rows, in, in, gate, layers, 2, result, threads);
    }
    default:
      double* sums = (double*)(result + 32768 * sizeof(int64_t));
      return deadband_observe(dtype, x, rows, in, in, first.scale, (int64_t*)result, sums, sums + in, threads);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) return puts(deadband_isa_list()) < 0;
  require(count == 4, "expected an instruction set and two files");
  require(!deadband_set_isa(arguments[1]) && !strcmp(deadband_isa(), arguments[1]), "no such instruction set");
  FILE *calls = fopen(arguments[2], "rb"), *results = fopen(arguments[3], "wb");
  require(calls && results, "a file cannot be opened");
  int64_t numbers[kNumbers];
  while (read_all(calls, numbers, sizeof numbers)) {
    int64_t counts[3] = {}, bytes = numbers[kResultBytes];
    char* result = before_a_wall(bytes);
    require(!call(numbers, calls, result, counts), "a call failed");
    require(fwrite(result, 1, bytes, results) == (size_t)bytes && fwrite(counts, 8, 3, results) == 3, "disk full");
  }
  return fclose(results);
}
