// y = x . W with W stored [in, out], 1 to 8 rows of x: the weights of the kept inputs stream by once.

// Reading is the limit: from memory this takes 80 to 90 % of the bandwidth that plain reading reaches. Measured on
// Emerald Rapids, one row, bfloat16 4096 x 4096, sparsity 0.5. Nothing to gain (within 2 %): eight inputs per pass,
// tiles of twice or four times the size, fetching two or four passes ahead, twice as long runs of outputs for each
// thread (so sharing out the inputs instead would not pay). Slower: not fetching ahead 18 %, tiles of 2048 outputs 3 %,
// fetching to the first-level cache instead of the second 3 %. Huge pages behind the weights gain 3 to 5 %.

// Outputs whose sums stay in the first-level cache while the weights pass (32 KB of it, for all rows together).
constexpr int64_t kTile = 8192;
// Weight rows that are added in one pass over the sums.
constexpr int kDepth = 4;
// Inputs added up before the sums go to the totals: a long chain loses accuracy with its length. No measurable time.
constexpr int64_t kChain = 64;

// The kept inputs: which, and the `rows` values of each (less the center), zero for a row that skips it.
struct Kept {
  int32_t* index;
  float* value;
  int64_t count;
};

// select_inputs writes whole vectors.
DEADBAND_INLINE size_t kept_bytes(int64_t count, size_t bytes) { return round_up((count + kLanes) * bytes, 64); }

template <class T>
float norm_of(const T* x, int64_t in) {
  constexpr int kParts = 32;  // sums side by side: as many as there are lanes, so that the compiler uses them
  float part[kParts] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kParts <= in; i += kParts)
    for (int k = 0; k < kParts; ++k) {
      float value = to_float(x[i + k]);
      part[k] += value * value;
    }
  for (; i < in; ++i) {
    float value = to_float(x[i]);
    sum += value * value;
  }
  for (float each : part) sum += each;
  return __builtin_sqrtf(sum);
}

// NaN and infinity have the largest exponent. A pass of its own: it takes vectors, where the one that selects cannot.
DEADBAND_INLINE uint32_t is_nonfinite(const float* p) {
  uint32_t bits;
  memcpy(&bits, p, sizeof bits);
  return (bits & 0x7fffffffu) >= 0x7f800000u;
}
DEADBAND_INLINE uint32_t is_nonfinite(const bf16* p) { return (*p & 0x7fffu) >= 0x7f80u; }

template <class T>
int64_t count_nonfinite(const T* x, int64_t in) {
  uint32_t count = 0;  // an input has fewer than 2^31 entries
  for (int64_t i = 0; i < in; ++i) count += is_nonfinite(x + i);
  return count;
}

// The rows of x, and what is found once for all layers that read them.
template <class T>
struct Input {
  const T* x;
  int64_t rows, stride, in;
  float norm[DEADBAND_STREAM_ROWS];  // of each row, where a threshold is relative
  int64_t nonfinite;                 // where entries are counted
};

// What the scores of one row are compared with. Below every score if the row's norm is infinite or NaN.
DEADBAND_INLINE float limit_of(const deadband_layer& layer, float norm) {
  if (!layer.relative) return *layer.threshold;
  float limit = *layer.threshold * norm;
  return limit < __builtin_inff() ? limit : -1.0f;
}

template <class T, int R>
int64_t select_inputs(const Input<T>& input, const deadband_layer& layer, Kept* kept) {
  constexpr int64_t rows = R;
  const T* x = input.x;
  int64_t x_stride = input.stride, in = input.in, count = 0, skipped = 0;
  if (!layer.threshold) {
    for (int64_t i = 0; i < in; ++i) {
      kept->index[i] = (int32_t)i;
      for (int64_t r = 0; r < rows; ++r) kept->value[i * rows + r] = to_float(x[r * x_stride + i]);
    }
    kept->count = in;
    return 0;
  }
  float limit[R];
  for (int r = 0; r < R; ++r) limit[r] = limit_of(layer, input.norm[r]);
  const float *scale = layer.scale, *center = layer.center;
  int64_t i = 0;
  if constexpr (R == 1) {
    for (; i + kLanes <= in; i += kLanes) {
      Vf value = load_in_order(x + i);
      if (center) value -= load(center + i);
      Vf score = magnitude(value);
      if (scale) score *= load(scale + i);
      count += store_kept(kept->value + count, kept->index + count, value, ~(Vu)(score <= limit[0]), (int32_t)i);
    }
    skipped = i - count;
  }
  for (; i < in; ++i) {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      float value = to_float(x[r * x_stride + i]);
      if (center) value -= center[i];
      float score = __builtin_fabsf(value);
      if (scale) score *= scale[i];
      bool skip = score <= limit[r];
      kept->value[count * rows + r] = skip ? 0.0f : value;
      skipped += skip;
      any |= !skip;
    }
    kept->index[count] = (int32_t)i;
    count += any;
  }
  kept->count = count;
  return skipped;
}

template <class T>
constexpr decltype(&select_inputs<T, 1>) kSelect[] = {select_inputs<T, 1>, select_inputs<T, 2>, select_inputs<T, 3>,
                                                      select_inputs<T, 4>, select_inputs<T, 5>, select_inputs<T, 6>,
                                                      select_inputs<T, 7>, select_inputs<T, 8>};

// sums[r] += the weights of K inputs times their values, over one tile. `ahead`: weights to fetch meanwhile.
template <class T, int R, int K>
DEADBAND_INLINE void add_inputs(const T* const* weight, const float* value, const T* const* ahead, int64_t width,
                                float* sums, int64_t sums_stride) {
  Vf x[K][R];
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) x[k][r] = splat(value[k * R + r]);
  auto step = [&](const Pair* w, int64_t j) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      Pair product = {w[0].a * x[0][r], w[0].b * x[0][r]};
      for (int k = 1; k < K; ++k) {
        product.a += w[k].a * x[k][r];
        product.b += w[k].b * x[k][r];
      }
      float* p = sums + r * sums_stride + j;
      store(p, load(p) + product.a);
      store(p + kLanes, load(p + kLanes) + product.b);
    }
  };
  Pair w[K];
  int64_t j = 0;
  for (; j + kBlock <= width; j += kBlock) {
    for (int k = 0; k < K; ++k) {
      __builtin_prefetch(ahead[k] + j, 0, 2);
      w[k] = load_pair(weight[k] + j);
    }
    step(w, j);
  }
  if (j < width) {
    for (int k = 0; k < K; ++k) w[k] = load_pair_part(weight[k] + j, width - j);
    step(w, j);
  }
}

// `count` float32 entries in the order that a pair of the other argument's type has.
DEADBAND_INLINE Pair load_offset(const float*, const float* p, int64_t count) { return load_pair_part(p, count); }
DEADBAND_INLINE Pair load_offset(const bf16*, const float* p, int64_t count) {
  float block[kBlock] = {}, even[kLanes], odd[kLanes];
  memcpy(block, p, count * sizeof(float));
  for (int lane = 0; lane < kLanes; ++lane) {
    even[lane] = block[2 * lane];
    odd[lane] = block[2 * lane + 1];
  }
  return {load(even), load(odd)};
}

// One tile of outputs: weight, bias and y point at its first one. sums, totals: [R][stride], stride >= the width in
// blocks.
template <class T, int R>
void stream_tile(const Kept& kept, const T* weight, int64_t weight_stride, int64_t width, const T* bias,
                 const float* offset, T* y, int64_t y_stride, float* sums, float* totals, int64_t stride) {
  for (int64_t j = 0; j < width; j += kBlock) {
    Pair start = {};
    if (bias) start = j + kBlock <= width ? load_pair(bias + j) : load_pair_part(bias + j, width - j);
    if (offset) {
      Pair more = load_offset(y, offset + j, min_of(kBlock, width - j));
      start = {start.a + more.a, start.b + more.b};
    }
    for (int r = 0; r < R; ++r) {
      store_pair(totals + r * stride + j, start);
      store_pair(sums + r * stride + j, Pair{});
    }
  }
  const T* row[kDepth];
  const T* ahead[kDepth];
  for (int64_t chain = 0; chain < kept.count; chain += kChain) {
    int64_t i = chain, end = min_of(kept.count, chain + kChain);
    for (; i + kDepth <= end; i += kDepth) {
      for (int k = 0; k < kDepth; ++k) {
        row[k] = weight + kept.index[i + k] * weight_stride;
        ahead[k] = weight + kept.index[min_of(i + kDepth + k, kept.count - 1)] * weight_stride;
      }
      add_inputs<T, R, kDepth>(row, kept.value + i * R, ahead, width, sums, stride);
    }
    for (; i < end; ++i) {
      row[0] = weight + kept.index[i] * weight_stride;
      add_inputs<T, R, 1>(row, kept.value + i * R, row, width, sums, stride);
    }
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < width; j += kBlock) {
        float *sum = sums + r * stride + j, *total = totals + r * stride + j;
        Pair s = load_pair(sum), t = load_pair(total);
        store_pair(total, Pair{t.a + s.a, t.b + s.b});
        store_pair(sum, Pair{});
      }
  }
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < width; j += kBlock) {
      Pair t = load_pair(totals + r * stride + j);
      if (j + kBlock <= width)
        store_pair(y + r * y_stride + j, t);
      else
        store_pair_part(y + r * y_stride + j, t, width - j);
    }
}

template <class T>
struct Output {
  const T* bias;
  const float* offset;
  T* y;
  int64_t stride;
};

// Bytes of sums that stream_range takes for so many outputs.
DEADBAND_INLINE size_t stream_bytes(int64_t rows, int64_t count) {
  return 2 * rows * min_of(kTile / rows, round_up(count, kBlock)) * sizeof(float);
}

// The outputs in `mine` of the product.
template <class T, int R>
void stream_range(const Kept& kept, const T* weight, int64_t weight_stride, const Output<T>& target, Range mine,
                  float* sums) {
  int64_t count = mine.end - mine.begin, tile = kTile / R, tiles = (count + tile - 1) / tile;
  int64_t stride = min_of(tile, round_up(count, kBlock));
  for (int64_t t = 0; t < tiles; ++t) {
    Range cut = share(count, kBlock, (int)t, (int)tiles);
    int64_t first = mine.begin + cut.begin;
    stream_tile<T, R>(kept, weight + first, weight_stride, cut.end - cut.begin,
                      target.bias ? target.bias + first : nullptr, target.offset ? target.offset + first : nullptr,
                      target.y + first, target.stride, sums, sums + R * stride, stride);
  }
}

template <class T>
constexpr decltype(&stream_range<T, 1>) kStream[] = {stream_range<T, 1>, stream_range<T, 2>, stream_range<T, 3>,
                                                     stream_range<T, 4>, stream_range<T, 5>, stream_range<T, 6>,
                                                     stream_range<T, 7>, stream_range<T, 8>};
