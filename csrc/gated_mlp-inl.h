// The gated MLP: two products on one x, an activation between them, and a third.
#ifndef DEADBAND_GATED_MLP_INL_H
#define DEADBAND_GATED_MLP_INL_H

#include <stdint.h>

#include "activation-inl.h"
#include "kernel_table.h"
#include "kernels.h"
#include "linears-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

template <class T>
int gated_mlp_typed(const T* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers, int which,
                    T* y, int threads) {
  int64_t inner = layers[0].out;
  T* both = (T*)workspace(kProductSlot, 2 * rows * inner * sizeof(T));
  if (!both) return DEADBAND_NO_MEMORY;
  if (int error = linears_typed(x, rows, x_stride, in, layers, 2, both, threads)) return error;
  for (int64_t r = 0; r < rows; ++r) {
    T* gate = both + 2 * r * inner;
    which == DEADBAND_SILU ? activate<DEADBAND_SILU>(gate, gate + inner, inner)
                           : activate<DEADBAND_GELU_TANH>(gate, gate + inner, inner);
  }
  return linears_typed(both, rows, 2 * inner, inner, layers + 2, 1, y, threads);
}

int gated_mlp(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const deadband_layer* layers,
              int activation, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return gated_mlp_typed((const float*)x, rows, x_stride, in, layers, activation, (float*)y, threads);
  return gated_mlp_typed((const bf16*)x, rows, x_stride, in, layers, activation, (bf16*)y, threads);
}

}  // namespace
}  // namespace deadband

#endif
