// The C interface of libdeadband_kernels: plain pointers and sizes, no torch, no Python.
//
// dtype: 0 = float32, 1 = bfloat16 (as uint16 bit patterns), 2 = float16 (deadband_observe only). Sums are float32.
// Functions that return int return 0, or a negative deadband_error for arguments they cannot serve; then nothing was
// written. Every size may be 0, and a pointer need be aligned to its element only. Several host threads may call at the
// same time. `threads` is an upper limit: small problems use fewer. The same arguments give the same bits, run after
// run.
#ifndef DEADBAND_KERNELS_H
#define DEADBAND_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DEADBAND_API __attribute__((visibility("default")))

enum deadband_dtype { DEADBAND_FLOAT32 = 0, DEADBAND_BFLOAT16 = 1, DEADBAND_FLOAT16 = 2 };
enum deadband_error {
  DEADBAND_BAD_DTYPE = -1,    // or a bad layout
  DEADBAND_BAD_SIZE = -2,     // negative, too many rows for this function, or a stride shorter than its run
  DEADBAND_BAD_POINTER = -3,  // NULL where data is needed
  DEADBAND_NO_MEMORY = -4,
  DEADBAND_BAD_ISA = -5,  // unknown, or not supported by this CPU
};

#define DEADBAND_STREAM_ROWS 8  // the most rows of deadband_sparse_linear
#define DEADBAND_DOT_ROWS 4     // the most rows of deadband_dense_linear with layout 1

// y[rows, out] = (x with its skipped entries set to zero)[rows, in] . W + bias, for 0 to 8 rows.
//
// x: [rows, in], x_stride elements between rows. weight: [in, out], the weights of one input contiguous, weight_stride
// elements between inputs. bias: [out] or NULL. y: [rows, out], contiguous. All of the one dtype.
// threshold: one float. scale: float[in], or NULL. center: float[in], or NULL; then offset is float[out], the product
// of center and weight, else NULL.
//
// An entry is skipped if score <= limit, where score = |x - center[i]| * scale[i] in float32 (without those that are
// NULL), and limit is the threshold or, with relative != 0, the threshold times the norm of the row of x. So a NaN
// score is kept: NaN and infinity surface as they do in the dense product, also in a row whose norm is not finite, of
// which everything is kept. A skipped entry counts as center[i], or as zero. The weights of an input are read if any
// row keeps it; those of an input that no row keeps are never met, whatever they hold. counts: NULL, or int64[3], which
// {entries skipped, entries seen, entries of x that are NaN or infinite} are added to atomically.
DEADBAND_API int deadband_sparse_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                                        const void* weight, int64_t weight_stride, int64_t out, const void* bias,
                                        const float* threshold, const float* scale, const float* center,
                                        const float* offset, int relative, void* y, int threads, int64_t* counts);

// y[rows, in] = x with its skipped entries set to the center, or to zero, by the rule above; keep[rows, in] = 1 where
// an entry is kept, else 0. Any number of rows; y and keep are contiguous.
DEADBAND_API int deadband_fill(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                               const float* threshold, const float* scale, const float* center, int relative, void* y,
                               uint8_t* keep, int threads, int64_t* counts);

// y = x . W + bias, with nothing skipped.
// layout 0: weight [in, out] as above; any number of rows. layout 1: weight [out, in], the usual one; 0 to 4 rows.
DEADBAND_API int deadband_dense_linear(int dtype, int layout, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                                       const void* weight, int64_t weight_stride, int64_t out, const void* bias,
                                       void* y, int threads);

// The same with a weight of 8 or 4 bits, for any number of rows without a threshold (NULL) and 0 to 8 with one.
//
// bits 8: codes is int8[in][out]. bits 4: uint8[in][row_bytes], row_bytes = (out + 31) / 32 * 16; of every 32 outputs,
// 16 bytes hold the first 16 in their lower nibbles and the others in their upper ones. group_size inputs share their
// scales: scales and minimum are float16[ceil(in / group_size)][out]; minimum may be NULL, and is where bits is 8.
// group_size 0: scales is float32[out], and minimum NULL. A code q stands for scale * q with 8 bits, scale * (q - 8)
// with 4, and scale * q + minimum where there is one. x is rounded to integers, those of a few inputs that are kept in
// steps of their own: with 8 bits of 1 / 32512 of the largest of at most 128, with 4 of 1 / 127 of the largest of at
// most 32 or, if that is less, of 3.2 times their root mean square; for a single row of 9 / 508 of that of at most 64.
// Where one of those is NaN or infinite, the whole row of y is NaN.
DEADBAND_API int deadband_quantized_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                                           int bits, const void* codes, const void* scales, const void* minimum,
                                           int64_t group_size, int64_t out, const void* bias, const float* threshold,
                                           const float* scale, const float* center, const float* offset, int relative,
                                           void* y, int threads, int64_t* counts);

// y[in, out], contiguous: the numbers that the codes stand for, as above.
DEADBAND_API int deadband_dequantize(int dtype, int bits, const void* codes, const void* scales, const void* minimum,
                                     int64_t group_size, int64_t in, int64_t out, void* y, int threads);

// One layer of the functions below: what deadband_sparse_linear takes (bits 0) or deadband_quantized_linear (8 or 4; no
// weight_stride then). The threshold may be NULL in both.
struct deadband_layer {
  int64_t bits, out;
  const void* weight;
  int64_t weight_stride;
  const void *scales, *minimum;
  int64_t group_size;
  const void* bias;
  const float *threshold, *scale, *center, *offset;
  int64_t relative;
  int64_t* counts;
};

// Several layers on the one x of 0 to 8 rows; x is read, and threads are woken, once for all of them. y: [rows, sum of
// the layers' out], the outputs of each layer beside those of the one before.
DEADBAND_API int deadband_linears(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                                  const struct deadband_layer* layers, int count, void* y, int threads);

// A layer with `count` weights, the experts, of which each row of x names the one it meets: experts[rows], of which a
// negative one gives a row of zeros. `first` is the layer of expert 0; those of the others lie so many bytes apart. All
// have one threshold, scale and center. Up to DEADBAND_EXPERT_ROWS rows. Weights that no row names are not read.
#define DEADBAND_EXPERT_ROWS 1024
struct deadband_expert_strides {
  int64_t weight, scales, minimum, bias, offset;
};
DEADBAND_API int deadband_expert_linear(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                                        const int64_t* experts, int64_t count, const struct deadband_layer* first,
                                        const struct deadband_expert_strides* strides, void* y, int threads);

// Mixtures of gated MLPs: y[tokens, layers[1].out] = the sum over a token's `each` experts of its weight times
// layers[1] of the product of activation(gate) and up, where layers[0] of x gives gate and up side by side. experts and
// weights: [tokens, each]; what meets a negative expert counts nothing. `layers` and `strides` are two each, as above.
// All that lies between is rounded to dtype. tokens * each is at most DEADBAND_EXPERT_ROWS.
DEADBAND_API int deadband_expert_mlp(int dtype, const void* x, int64_t tokens, int64_t x_stride, int64_t in,
                                     const int64_t* experts, int64_t each, int64_t count,
                                     const struct deadband_layer* layers, const struct deadband_expert_strides* strides,
                                     int activation, const float* weights, void* y, int threads);

// y[rows, layers[2].out] = layers[2] of the product of activation(layers[0] of x) and layers[1] of x, 0 to 8 rows. The
// outputs of both layers, of the activation and the product are rounded to dtype.
enum deadband_activation { DEADBAND_SILU = 0, DEADBAND_GELU_TANH = 1 };
DEADBAND_API int deadband_gated_mlp(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                                    const struct deadband_layer* layers, int activation, void* y, int threads);

// y[rows, layers[1].out] = layers[1] of the product of gate and layers[0] of x, 0 to 8 rows, where gate [rows,
// layers[0].out], contiguous, holds what was made of another layer's outputs. The threshold and the scale of layers[0]
// are those of the gate's entries, its counts count them: of outputs whose entry is skipped in all rows no weight is
// read, and their product is zero. It has no center. Its weight lies by output: [out, in], weight_stride elements
// between outputs; codes [out][in] of 8 bits, and of 4 bits [row_bytes][in], byte by byte the transpose of the above;
// scales and minimum [out][groups]. x is not rounded for it. The outputs of layers[0] and the product are rounded to
// dtype. With a count of 1 there is no layers[1], and y[rows, layers[0].out] is the product; then gate may be NULL, for
// the outputs of layers[0] alone.
DEADBAND_API int deadband_gated_down(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in,
                                     const void* gate, const struct deadband_layer* layers, int count, void* y,
                                     int threads);

// Attention of one token: y[h] = the mean of values over tokens, weighted by softmax(score[h] + mask), where score[h] =
// query[h] * scaling . keys, or softcap * tanh(that / softcap) where softcap > 0. Sums are float32.
//
// query: [groups * heads, size], y: [groups * heads, value_size], contiguous; the heads of a group are neighbours.
// keys: [groups][size][tokens], key_group and key_stride elements between groups and between entries; values:
// [groups][tokens][value_size], value_group and value_stride elements between groups and between tokens. mask:
// float[tokens]. Without tokens y is zero.
DEADBAND_API int deadband_attend(int dtype, const void* query, const void* keys, const void* values, int64_t groups,
                                 int64_t heads, int64_t size, int64_t value_size, int64_t tokens, int64_t key_group,
                                 int64_t key_stride, int64_t value_group, int64_t value_stride, const float* mask,
                                 float scaling, float softcap, void* y, int threads);

// One pass of statistics over x [rows, cols]; everything is added to what the buffers hold.
// histogram: int64[32768], indexed by the upper half of the score's float32 pattern: (bits & 0x7fffffff) >> 16. The
// bins from 0x7f80 on count infinity and NaN. sum, sum_of_squares: double[cols], of x and x * x, over finite entries
// only.
DEADBAND_API int deadband_observe(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t cols,
                                  const float* scale, int64_t* histogram, double* sum, double* sum_of_squares,
                                  int threads);

// Bytes per second of reading `count` rows of `row_bytes` once, `stride` bytes apart: those that `index` names, in its
// order, or with NULL the first. There are DEADBAND_READ_LOOPS ways of it; what memory gives is what the best of them
// reads. Meaningful for much more than the caches hold. 0 for a negative size, another loop, or nothing to read. seen:
// NULL, or what these bytes give or'ed.
#define DEADBAND_READ_LOOPS 12
DEADBAND_API double deadband_read_bandwidth(const void* data, int64_t stride, int64_t row_bytes, const int32_t* index,
                                            int64_t count, int loop, int threads, uint8_t* seen);

// Asks for huge pages behind the whole pages inside the buffer, written to or not; what it holds stays. Returns 1 if
// the system took the advice, 0 if it could not help.
DEADBAND_API int deadband_advise_huge(void* data, int64_t bytes);

// The instruction set in use, those that this CPU can run (comma-separated), and the choice of another:
// DEADBAND_BAD_ISA if the name is unknown or not supported. The environment variable DEADBAND_ISA chooses when the
// library is loaded. Names: "baseline"; "x86-64-v3", "x86-64-v3-vnni", "x86-64-v4", "x86-64-v4-vnni", "x86-64-v4-bf16"
// (with VNNI); "aarch64-dotprod".
DEADBAND_API const char* deadband_isa(void);
DEADBAND_API const char* deadband_isa_list(void);
DEADBAND_API int deadband_set_isa(const char* name);

#ifdef __cplusplus
}
#endif

#endif
