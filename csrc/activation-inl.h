// The exponential, and the activations that are made of it.
#ifndef DEADBAND_ACTIVATION_INL_H
#define DEADBAND_ACTIVATION_INL_H

#include <stdint.h>
#include <string.h>

#include "bytes-inl.h"
#include "kernels.h"
#include "sizes-inl.h"
#include "vector-inl.h"

namespace deadband {
namespace {

// e^v to 2 ulp. 2^n comes in two factors, as n may be beyond the exponents of normal numbers.
DEADBAND_INLINE Vf exponential(Vf v) {
  v = v > 89.0f ? splat(89.0f) : v;  // infinity from there on; NaN stays
  v = v < -104.0f ? splat(-104.0f) : v;
  Vf n = v * 1.44269504f + 12582912.0f - 12582912.0f;  // to the nearest integer
  Vf r = v - n * 0.693145752f - n * 1.42860677e-6f;
  Vf p =
      1.0f +
      r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
  Vi half = __builtin_convertvector(n * 0.5f, Vi), rest = __builtin_convertvector(n, Vi) - half;
  return p * (Vf)((half + 127) << 23) * (Vf)((rest + 127) << 23);
}

// Both activations are v / (1 + e^-z): SiLU with z = v, and the tanh of GELU's is that of z / 2.
template <int Activation>
DEADBAND_INLINE Vf activation(Vf v) {
  Vf z = Activation == DEADBAND_SILU ? v : v * 1.59576912f + v * v * v * 0.0713548163f;
  return v / (1.0f + exponential(-z));
}

DEADBAND_INLINE Vf rounded_as(const float*, Vf v) { return v; }
DEADBAND_INLINE Vf rounded_as(const bf16*, Vf v) { return (Vf)(rounded_bits(v) & 0xffff0000u); }

// gate = activation(gate) * up
template <int Activation, class T>
void activate(T* gate, const T* up, int64_t count) {
  auto step = [](T* g, const T* u) __attribute__((always_inline)) {
    store_in_order(g, rounded_as(g, activation<Activation>(load_in_order(g))) * load_in_order(u));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step(gate + i, up + i);
  if (i == count) return;
  T last[2][kLanes] = {};
  memcpy(last[0], gate + i, (count - i) * sizeof(T));
  memcpy(last[1], up + i, (count - i) * sizeof(T));
  step(last[0], last[1]);
  memcpy(gate + i, last[0], (count - i) * sizeof(T));
}

}  // namespace
}  // namespace deadband

#endif
