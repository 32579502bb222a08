// The exported functions of the kernels: check the arguments, then call the kernel of the instruction set in use.
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "kernel_table.h"
#include "kernels.h"

namespace deadband {
namespace {

// Sizes whose products overflow are refused with those that are negative.
constexpr int64_t kLargest = INT32_MAX;
template <class... Sizes>
bool are_sizes(Sizes... sizes) {
  return ((sizes >= 0 && sizes <= kLargest) && ...);
}

bool is_float32_or_bfloat16(int dtype) { return dtype == DEADBAND_FLOAT32 || dtype == DEADBAND_BFLOAT16; }

// Both linear functions.
int check_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
                 int64_t weight_stride, int64_t runs, int64_t run, const void* y, int64_t out) {
  if (!is_float32_or_bfloat16(dtype)) return DEADBAND_BAD_DTYPE;
  if (!are_sizes(rows, in, out)) return DEADBAND_BAD_SIZE;
  if ((rows > 1 && x_stride < in) || (runs > 1 && weight_stride < run)) return DEADBAND_BAD_SIZE;
  if (rows && out && (!y || (in && (!x || !weight)))) return DEADBAND_BAD_POINTER;
  return 0;
}

int64_t row_bytes_of(const deadband_layer& layer) { return layer.bits == 8 ? layer.out : (layer.out + 31) / 32 * 16; }

// A quantised layer's, as far as it needs and takes them.
bool has_scales(int64_t in, const deadband_layer& layer) {
  if (in && layer.out && !layer.scales) return false;
  return !layer.minimum || (layer.bits == 4 && layer.group_size);
}

int check_layer(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer& layer,
                const void* y) {
  if (layer.bits != 0 && layer.bits != 8 && layer.bits != 4) return DEADBAND_BAD_DTYPE;
  if (!are_sizes(layer.out)) return DEADBAND_BAD_SIZE;
  int64_t run = layer.bits ? row_bytes_of(layer) : layer.out;
  if (int error = check_linear(dtype, x, rows, x_stride, in, layer.weight, layer.bits ? run : layer.weight_stride, in,
                               run, y, layer.out))
    return error;
  if (layer.group_size < 0 || (layer.threshold && rows > DEADBAND_STREAM_ROWS)) return DEADBAND_BAD_SIZE;
  if (!layer.center != !layer.offset) return DEADBAND_BAD_POINTER;
  if (layer.bits && !has_scales(in, layer)) return DEADBAND_BAD_POINTER;
  return 0;
}

// A layer of experts skips entries of as many rows as it is given.
deadband_layer without_rule(deadband_layer layer) {
  layer.threshold = nullptr;
  return layer;
}

int check_experts(int64_t rows, const int64_t* experts, int64_t count) {
  if (!are_sizes(rows, count) || rows > DEADBAND_EXPERT_ROWS) return DEADBAND_BAD_SIZE;
  if (rows && !experts) return DEADBAND_BAD_POINTER;
  for (int64_t r = 0; r < rows; ++r)
    if (experts[r] >= count) return DEADBAND_BAD_SIZE;
  return 0;
}

int check_attend(int dtype, int64_t groups, int64_t heads, int64_t size, int64_t value_size, int64_t tokens,
                 int64_t key_stride, int64_t value_stride) {
  if (!is_float32_or_bfloat16(dtype)) return DEADBAND_BAD_DTYPE;
  if (!are_sizes(groups, heads, size, value_size, tokens) || !are_sizes(groups * heads)) return DEADBAND_BAD_SIZE;
  if ((size > 1 && key_stride < tokens) || (tokens > 1 && value_stride < value_size)) return DEADBAND_BAD_SIZE;
  return 0;
}

}  // namespace

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

int deadband_expert_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const int64_t* experts,
                           int64_t count, const deadband_layer* first, const deadband_expert_strides* strides, void* y,
                           int threads) {
  if (!first || !strides) return DEADBAND_BAD_POINTER;
  if (int error = check_experts(rows, experts, count)) return error;
  if (int error = check_layer(dtype, x, rows, x_stride, in, without_rule(*first), y)) return error;
  if (!rows || !first->out) return 0;
  return kernels()->experts(dtype, x, rows, x_stride, in, experts, *first, *strides, y, threads < 1 ? 1 : threads);
}

int deadband_expert_mlp(int dtype, const void* x, int64_t tokens, int64_t x_stride, int64_t in, const int64_t* experts,
                        int64_t each, int64_t count, const deadband_layer* layers,
                        const deadband_expert_strides* strides, int activation, const float* weights, void* y,
                        int threads) {
  if (activation != DEADBAND_SILU && activation != DEADBAND_GELU_TANH) return DEADBAND_BAD_DTYPE;
  if (!are_sizes(tokens, each)) return DEADBAND_BAD_SIZE;
  if (!layers || !strides || (tokens && each && !weights)) return DEADBAND_BAD_POINTER;
  if (int error = check_experts(tokens * each, experts, count)) return error;
  if (layers[0].out % 2) return DEADBAND_BAD_SIZE;
  int64_t inner = layers[0].out / 2;
  // what is between the layers is memory of the kernel's own
  if (int error = check_layer(dtype, x, tokens, x_stride, in, without_rule(layers[0]), layers)) return error;
  if (int error = check_layer(dtype, layers, tokens, inner, inner, without_rule(layers[1]), y)) return error;
  if (!tokens || !layers[1].out) return 0;
  return kernels()->expert_mlp(dtype, x, tokens, x_stride, in, experts, each, layers, strides, activation, weights, y,
                               threads < 1 ? 1 : threads);
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

int deadband_gated_down(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* gate,
                        const deadband_layer* layers, int count, void* y, int threads) {
  if (rows > DEADBAND_STREAM_ROWS || (count != 1 && count != 2)) return DEADBAND_BAD_SIZE;
  if (!layers) return DEADBAND_BAD_POINTER;
  deadband_layer up = layers[0];
  int64_t inner = up.out;
  if (up.bits == 0 && inner > 1 && up.weight_stride < in) return DEADBAND_BAD_SIZE;
  if (up.bits == 0) up.weight_stride = inner;  // checked, by outputs as it lies
  if (up.center || up.offset || (rows && inner && !gate && count == 2)) return DEADBAND_BAD_POINTER;
  // what is between the layers is memory of the kernel's own
  if (int error = check_layer(dtype, x, rows, x_stride, in, up, count == 2 ? layers : y)) return error;
  if (count == 2)
    if (int error = check_layer(dtype, layers, rows, inner, inner, layers[1], y)) return error;
  if (!rows || !layers[count - 1].out) return 0;
  return kernels()->gated_down(dtype, x, rows, x_stride, in, gate, layers, count, y, threads < 1 ? 1 : threads);
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

int deadband_fill(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const float* threshold,
                  const float* scale, const float* center, int relative, void* y, uint8_t* keep, int threads,
                  int64_t* counts) {
  if (!is_float32_or_bfloat16(dtype)) return DEADBAND_BAD_DTYPE;
  if (!are_sizes(rows, in) || (rows > 1 && x_stride < in)) return DEADBAND_BAD_SIZE;
  if (!threshold || (rows && in && (!x || !y || !keep))) return DEADBAND_BAD_POINTER;
  if (!rows || !in) return 0;
  deadband_layer layer = {};
  layer.threshold = threshold;
  layer.scale = scale;
  layer.center = center;
  layer.relative = relative;
  layer.counts = counts;
  kernels()->fill(dtype, x, rows, x_stride, in, layer, y, keep, threads < 1 ? 1 : threads);
  return 0;
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
  if (rows <= kernels()->stream_rows[dtype])
    return kernels()->linears(dtype, x, rows, x_stride, in, &layer, 1, y, threads);
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

int deadband_dequantize(int dtype, int bits, const void* codes, const void* scales, const void* minimum,
                        int64_t group_size, int64_t in, int64_t out, void* y, int threads) {
  if (!is_float32_or_bfloat16(dtype) || (bits != 8 && bits != 4)) return DEADBAND_BAD_DTYPE;
  if (!are_sizes(in, out, group_size)) return DEADBAND_BAD_SIZE;
  if (!in || !out) return 0;
  if (!codes || !scales || !y || (minimum && (bits == 8 || !group_size))) return DEADBAND_BAD_POINTER;
  kernels()->dequantize(dtype, bits, codes, scales, minimum, group_size, in, out, y, threads < 1 ? 1 : threads);
  return 0;
}

int deadband_attend(int dtype, const void* query, const void* keys, const void* values, int64_t groups, int64_t heads,
                    int64_t size, int64_t value_size, int64_t tokens, int64_t key_group, int64_t key_stride,
                    int64_t value_group, int64_t value_stride, const float* mask, float scaling, float softcap, void* y,
                    int threads) {
  if (int error = check_attend(dtype, groups, heads, size, value_size, tokens, key_stride, value_stride)) return error;
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

double deadband_read_bandwidth(const void* data, int64_t stride, int64_t row_bytes, const int32_t* index, int64_t count,
                               int loop, int threads, uint8_t* seen) {
  if (!data || stride < 0 || row_bytes <= 0 || count <= 0 || loop < 0 || loop >= DEADBAND_READ_LOOPS) return 0;
  timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  uint8_t bits = kernels()->read({data, stride, row_bytes, index, count}, loop, threads < 1 ? 1 : threads);
  clock_gettime(CLOCK_MONOTONIC, &end);
  if (seen) *seen = bits;
  double seconds = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
  return (double)(count * row_bytes) / seconds;
}
