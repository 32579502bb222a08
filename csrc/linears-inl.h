// Several layers on one x, plain and quantised ones: selected (and encoded) one after the other, then multiplied in one
// parallel region.
#ifndef DEADBAND_LINEARS_INL_H
#define DEADBAND_LINEARS_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "encode-inl.h"
#include "kernel_table.h"
#include "kernels.h"
#include "panels-inl.h"
#include "quantized-inl.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "stream-inl.h"
#include "threads-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// What is known of a layer once its inputs are selected.
template <class T>
struct Task {
  Output<T> target;
  Kept kept;
  Quantized quantized;  // and the rest: of a quantised layer
  Encoded encoded;
  float* sums;  // the threads', where they share out the inputs
};

DEADBAND_INLINE size_t task_bytes(const deadband_layer& layer, int64_t rows, int64_t in, int threads) {
  size_t bytes = 0;
  if (!layer.bits || layer.threshold) bytes = kept_bytes(in, sizeof(int32_t)) + kept_bytes(in * rows, sizeof(float));
  if (!layer.bits) return bytes;
  Quantized w = quantized_of(layer, in);
  bytes += EncodedSizes(w, rows, rows > 1 ? panel_chunk(w, rows) : kChunkMost).total();
  return bytes + (by_inputs(w, rows, threads) ? threads * sums_stride(w) * sizeof(float) : 0);
}

template <class T>
DEADBAND_INLINE void add_counts(const Input<T>& input, int64_t skipped, int64_t* counts) {
  __atomic_fetch_add(&counts[0], skipped, __ATOMIC_RELAXED);
  __atomic_fetch_add(&counts[1], input.in * input.rows, __ATOMIC_RELAXED);
  if (input.nonfinite) __atomic_fetch_add(&counts[2], input.nonfinite, __ATOMIC_RELAXED);
}

// Selects a layer's inputs into `memory`. Returns the work left, in bytes of weights.
template <class T>
int64_t prepare(const Input<T>& input, const deadband_layer& layer, int threads, char* memory, Task<T>* task) {
  int64_t rows = input.rows, in = input.in;
  task->kept = {nullptr, nullptr, in};
  if (!layer.bits || layer.threshold) {
    size_t index_bytes = kept_bytes(in, sizeof(int32_t));
    task->kept = {(int32_t*)memory, (float*)(memory + index_bytes), 0};
    memory += index_bytes + kept_bytes(in * rows, sizeof(float));
    int64_t skipped = kSelect<T>[rows - 1](input, layer, & task->kept);
    if (layer.threshold && layer.counts) add_counts(input, skipped, layer.counts);
  }
  if (!layer.bits) return task->kept.count * layer.out * (int64_t)sizeof(T);
  task->quantized = quantized_of(layer, in);
  if (rows > 1) {
    task->encoded = encode_rows(input, task->kept, task->quantized, threads, memory);
    return rows * task->kept.count * layer.out / (kOperationsPerThread / kBytesPerThread);
  }
  task->encoded = encode(input, task->kept, task->quantized, threads, memory);
  task->sums = (float*)(memory + EncodedSizes(task->quantized, 1, kChunkMost).total());
  return task->kept.count * task->quantized.row_bytes;
}

// A thread's memory for its share of a layer.
DEADBAND_INLINE size_t share_bytes(const deadband_layer& layer, int64_t rows, int64_t in) {
  if (!layer.bits) return stream_bytes(rows, layer.out);
  Quantized w = quantized_of(layer, in);
  if (rows > 1) return layer.bits == 8 ? panel_bytes<8>(w, rows) : panel_bytes<4>(w, rows);
  return multiply_bytes(w);
}

// The outputs in `mine`, which begin and end at multiples of kOutputStep.
template <class T>
void multiply_range(const deadband_layer& layer, const Task<T>& task, int64_t rows, Range mine, char* scratch) {
  const Quantized& w = task.quantized;
  const Encoded& x = task.encoded;
  if (!layer.bits)
    kStream<T>[rows - 1](task.kept, (const T*)layer.weight, layer.weight_stride, task.target, mine, (float*)scratch);
  else if (rows == 1)
    multiply_outputs<T>(w, x, task.target, mine, scratch);
  else
    layer.bits == 8 ? multiply_rows<T, 8>(w, x, task.target, mine, scratch)
                    : multiply_rows<T, 4>(w, x, task.target, mine, scratch);
}

template <class T>
void multiply(const deadband_layer& layer, const Task<T>& task, int64_t rows, int part, int parts, bool inputs,
              char* scratch) {
  const Quantized& w = task.quantized;
  const Encoded& x = task.encoded;
  if (inputs)
    stream_outputs(w, x, share(x.chunks, 1, part, parts), {0, w.out}, task.sums + part * sums_stride(w));
  else
    multiply_range(layer, task, rows, share(layer.out, layer.bits ? kOutputStep : 64, part, parts), scratch);
}

// What the rules of the layers need to know of x.
template <class T>
Input<T> input_of(const T* x, int64_t rows, int64_t stride, int64_t in, const deadband_layer* layers, int count) {
  Input<T> input = {x, rows, stride, in, {}, 0};
  bool relative = false, counted = false;
  for (int l = 0; l < count; ++l) {
    relative |= layers[l].threshold && layers[l].relative;
    counted |= layers[l].threshold && layers[l].counts;
  }
  for (int64_t r = 0; relative && r < rows; ++r) input.norm[r] = norm_of(x + r * stride, in);
  for (int64_t r = 0; counted && r < rows; ++r) input.nonfinite += count_nonfinite(x + r * stride, in);
  return input;
}

template <class T>
int linears_of(const T* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers, int count, T* y,
               int64_t y_stride, int threads) {
  size_t bytes = round_up(count * sizeof(Task<T>), 64), most = 0;
  for (int l = 0; l < count; ++l) {
    bytes += task_bytes(layers[l], rows, in, threads);
    most = max_of(most, share_bytes(layers[l], rows, in));
  }
  char* memory = (char*)workspace(kSharedSlot, bytes);
  if (!memory) return DEADBAND_NO_MEMORY;
  Input<T> input = input_of(x, rows, x_stride, in, layers, count);
  Task<T>* tasks = (Task<T>*)memory;
  memory += round_up(count * sizeof(Task<T>), 64);
  int64_t work = 0, first = 0;
  for (int l = 0; l < count; ++l) {
    const deadband_layer& layer = layers[l];
    tasks[l].target = {(const T*)layer.bias, layer.threshold ? layer.offset : nullptr, y + first, y_stride};
    work += prepare(input, layer, threads, memory, tasks + l);
    memory += task_bytes(layer, rows, in, threads);
    first += layer.out;
  }
  threads = threads_for(work, kBytesPerThread, threads);
  auto shares_inputs = [&](int l) { return layers[l].bits && by_inputs(tasks[l].quantized, rows, threads); };
  for (int l = 0; l < count; ++l)
    if (shares_inputs(l)) memset(tasks[l].sums, 0, threads * sums_stride(tasks[l].quantized) * sizeof(float));
  int error = 0;
  parallel(threads, [&](int part, int parts) {
    char* scratch = (char*)workspace(kPrivateSlot, most);
    if (!scratch) {
      __atomic_store_n(&error, (int)DEADBAND_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    for (int l = 0; l < count; ++l)  // every other layer from the other end, as the last share is often the largest
      multiply(layers[l], tasks[l], rows, l & 1 ? parts - 1 - part : part, parts, shares_inputs(l), scratch);
  });
  for (int l = 0; l < count; ++l)
    if (shares_inputs(l)) add_up(tasks[l].quantized, tasks[l].target, threads, tasks[l].sums);
  return error;
}

template <class T>
int linears_typed(const T* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers, int count, T* y,
                  int threads) {
  int64_t y_stride = 0;
  for (int l = 0; l < count; ++l) y_stride += layers[l].out;
  int pieces = (int)((rows + kQuantizedRows - 1) / kQuantizedRows);  // one, unless for a quantised layer alone
  for (int piece = 0; piece < pieces; ++piece) {
    Range own = share(rows, 1, piece, pieces);
    if (int error = linears_of(x + own.begin * x_stride, own.end - own.begin, x_stride, in, layers, count,
                               y + own.begin * y_stride, y_stride, threads))
      return error;
  }
  return 0;
}

int linears(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers,
            int count, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return linears_typed((const float*)x, rows, x_stride, in, layers, count, (float*)y, threads);
  return linears_typed((const bf16*)x, rows, x_stride, in, layers, count, (bf16*)y, threads);
}

}  // namespace
}  // namespace deadband

#endif
