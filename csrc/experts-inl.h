// Layers with several weights, of which each row of x names the one it meets: rows of one expert are multiplied
// together, and all experts in one parallel region. And two of them with an activation between: experts that are MLPs.
#ifndef DEADBAND_EXPERTS_INL_H
#define DEADBAND_EXPERTS_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "activation-inl.h"
#include "kernel_table.h"
#include "kernels.h"
#include "linears-inl.h"
#include "quantized-inl.h"
#include "select-inl.h"
#include "sizes-inl.h"
#include "stream-inl.h"
#include "threads-inl.h"

namespace deadband {
namespace {

// Rows of x that meet one expert, at most DEADBAND_STREAM_ROWS.
struct Piece {
  deadband_layer layer;
  int64_t rows, expert;
  int32_t row[DEADBAND_STREAM_ROWS];
  char* memory;  // of its task
  int64_t work;
};

template <class P>
DEADBAND_INLINE P* moved(P* pointer, int64_t bytes) {
  return pointer ? (P*)((const char*)pointer + bytes) : nullptr;
}

DEADBAND_INLINE deadband_layer layer_of(const deadband_layer& first, const deadband_expert_strides& strides,
                                        int64_t expert) {
  deadband_layer layer = first;
  layer.weight = moved(first.weight, expert * strides.weight);
  layer.scales = moved(first.scales, expert * strides.scales);
  layer.minimum = moved(first.minimum, expert * strides.minimum);
  layer.bias = moved(first.bias, expert * strides.bias);
  layer.offset = moved(first.offset, expert * strides.offset);
  return layer;
}

// The rows, by expert. Returns how many pieces there are; there is room for as many as rows.
DEADBAND_INLINE int64_t cut_pieces(const int64_t* experts, int64_t rows, Piece* pieces) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (experts[r] < 0) continue;
    int64_t p = count;
    while (p && !(pieces[p - 1].expert == experts[r] && pieces[p - 1].rows < DEADBAND_STREAM_ROWS)) --p;
    Piece& piece = pieces[p ? p - 1 : count++];
    if (!p) {
      piece.expert = experts[r];
      piece.rows = 0;
    }
    piece.row[piece.rows++] = (int32_t)r;
  }
  return count;
}

// Outputs of a piece that a thread takes are whole numbers of these.
constexpr int64_t kExpertStep = 128;

// Rows of x: each stands for as many rows as a token has experts, one after the other.
template <class T>
struct RowsOf {
  const T* x;
  int64_t stride, each;
  const T* at(int64_t row) const { return x + row / each * stride; }
};

// before(row): what is done to a row of x before it is looked at.
template <class T, class Before>
int experts_typed(const RowsOf<T>& x, int64_t rows, int64_t in, const int64_t* experts, const deadband_layer& first,
                  const deadband_expert_strides& strides, T* y, int threads, Before before) {
  int64_t out = first.out;
  for (int64_t r = 0; r < rows; ++r)
    if (experts[r] < 0) memset(y + r * out, 0, out * sizeof(T));
  size_t heads = round_up(rows * sizeof(Piece), 64), tasks_at = heads;
  heads += round_up(rows * sizeof(Task<T>), 64);
  Piece* pieces = (Piece*)workspace(kProductSlot, heads);
  if (!pieces) return DEADBAND_NO_MEMORY;
  int64_t count = cut_pieces(experts, rows, pieces);
  if (!count) return 0;
  // rows that are multiplied together lie side by side, and so do their results
  size_t bytes = 0, most = 0;
  for (int64_t p = 0; p < count; ++p) {
    Piece& piece = pieces[p];
    piece.layer = layer_of(first, strides, piece.expert);
    bytes += round_up(task_bytes(piece.layer, piece.rows, in, 1), 64);
    if (piece.rows > 1) bytes += round_up(piece.rows * (in + out) * sizeof(T), 64);
    most = max_of(most, share_bytes(piece.layer, piece.rows, in));
  }
  char* memory = (char*)workspace(kSharedSlot, bytes);
  if (!memory) return DEADBAND_NO_MEMORY;
  for (int64_t p = 0; p < count; ++p) {
    Piece& piece = pieces[p];
    piece.memory = memory;
    memory += round_up(task_bytes(piece.layer, piece.rows, in, 1), 64);
    if (piece.rows > 1) memory += round_up(piece.rows * (in + out) * sizeof(T), 64);
  }
  Task<T>* tasks = (Task<T>*)((char*)pieces + tasks_at);
  parallel(threads_for(rows * in, kEncodedPerThread, threads), [&](int part, int parts) {
    Range mine = share(count, 1, part, parts);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      Piece& piece = pieces[p];
      for (int64_t r = 0; r < piece.rows; ++r) before(piece.row[r]);
      const T* own = x.at(piece.row[0]);
      int64_t stride = x.stride;
      T* to = y + piece.row[0] * out;
      if (piece.rows > 1) {
        T* gathered = (T*)(piece.memory + round_up(task_bytes(piece.layer, piece.rows, in, 1), 64));
        for (int64_t r = 0; r < piece.rows; ++r) memcpy(gathered + r * in, x.at(piece.row[r]), in * sizeof(T));
        own = gathered;
        stride = in;
        to = gathered + piece.rows * in;
      }
      Input<T> input = input_of(own, piece.rows, stride, in, &piece.layer, 1);
      tasks[p].target = {(const T*)piece.layer.bias, piece.layer.threshold ? piece.layer.offset : nullptr, to, out};
      piece.work = prepare(input, piece.layer, 1, piece.memory, tasks + p);
    }
  });
  int64_t work = 0;
  for (int64_t p = 0; p < count; ++p) work += ++pieces[p].work;
  int error = 0;
  parallel(threads_for(work, kBytesPerThread, threads), [&](int part, int parts) {
    char* scratch = (char*)workspace(kPrivateSlot, most);
    if (!scratch) {
      __atomic_store_n(&error, (int)DEADBAND_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    // each thread's part of all work is a few experts, whole but for the first and the last
    double begin = (double)work * part / parts, end = (double)work * (part + 1) / parts, done = 0;
    int64_t steps = (out + kExpertStep - 1) / kExpertStep;
    for (int64_t p = 0; p < count; ++p) {
      double own = (double)pieces[p].work;
      auto cut = [&](double at) {
        double whole = (at - done) / own * (double)steps + 0.5;
        return min_of(out, max_of(0, min_of(steps, (int64_t)max_of(0, (int64_t)whole))) * kExpertStep);
      };
      Range mine = {part ? cut(begin) : 0, part + 1 < parts ? cut(end) : out};
      if (mine.begin < mine.end) multiply_range(pieces[p].layer, tasks[p], pieces[p].rows, mine, scratch);
      done += own;
    }
  });
  for (int64_t p = 0; p < count; ++p)
    for (int64_t r = 0; pieces[p].rows > 1 && r < pieces[p].rows; ++r)
      memcpy(y + pieces[p].row[r] * out, tasks[p].target.y + r * out, out * sizeof(T));
  return error;
}

template <class T>
int expert_mlp_typed(const T* x, int64_t tokens, int64_t x_stride, int64_t in, const int64_t* experts, int64_t each,
                     const deadband_layer* layers, const deadband_expert_strides* strides, int which,
                     const float* weights, T* y, int threads) {
  int64_t rows = tokens * each, inner = layers[0].out / 2, out = layers[1].out;
  T* both = (T*)workspace(kExpertsSlot, rows * (2 * inner + out) * sizeof(T));
  if (!both) return DEADBAND_NO_MEMORY;
  T* results = both + 2 * rows * inner;
  RowsOf<T> from = {x, x_stride, each};
  if (int error = experts_typed(from, rows, in, experts, layers[0], strides[0], both, threads, [](int64_t) {}))
    return error;
  auto gate = [&](int64_t row) {
    T* own = both + 2 * row * inner;
    which == DEADBAND_SILU ? activate<DEADBAND_SILU>(own, own + inner, inner)
                           : activate<DEADBAND_GELU_TANH>(own, own + inner, inner);
  };
  from = {both, 2 * inner, 1};
  if (int error = experts_typed(from, rows, inner, experts, layers[1], strides[1], results, threads, gate))
    return error;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* own = results + t * each * out;
    int64_t o = 0;
    for (; o + kLanes <= out; o += kLanes) {
      Vf sum = {};
      for (int64_t k = 0; k < each; ++k)
        if (experts[t * each + k] >= 0) sum += load_in_order(own + k * out + o) * weights[t * each + k];
      store_in_order(y + t * out + o, sum);
    }
    for (; o < out; ++o) {
      float sum = 0;
      for (int64_t k = 0; k < each; ++k)
        if (experts[t * each + k] >= 0) sum += weights[t * each + k] * to_float(own[k * out + o]);
      store_one(y + t * out + o, sum);
    }
  }
  return 0;
}

int expert_mlp(int dtype, const void* x, int64_t tokens, int64_t x_stride, int64_t in, const int64_t* experts,
               int64_t each, const deadband_layer* layers, const deadband_expert_strides* strides, int activation,
               const float* weights, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return expert_mlp_typed((const float*)x, tokens, x_stride, in, experts, each, layers, strides, activation, weights,
                            (float*)y, threads);
  return expert_mlp_typed((const bf16*)x, tokens, x_stride, in, experts, each, layers, strides, activation, weights,
                          (bf16*)y, threads);
}

int experts(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const int64_t* experts,
            const deadband_layer& first, const deadband_expert_strides& strides, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return experts_typed(RowsOf<float>{(const float*)x, x_stride, 1}, rows, in, experts, first, strides, (float*)y,
                         threads, [](int64_t) {});
  return experts_typed(RowsOf<bf16>{(const bf16*)x, x_stride, 1}, rows, in, experts, first, strides, (bf16*)y, threads,
                       [](int64_t) {});
}

}  // namespace
}  // namespace deadband

#endif
