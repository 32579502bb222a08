// y = x . W with W stored [in, out] and many rows of x (prefill): a blocked product on float32 values.
//
// bfloat16 weights are converted while they are packed. The bfloat16 dot product instruction would not help: on Emerald
// Rapids vdpbf16ps starts every other cycle and float32 multiply-adds two a cycle, so that these do twice the work.

// Rows of x whose sums fit the registers, next to a block of weights: with 2 vectors a row, 28 of AVX-512's 32.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__aarch64__)
constexpr int kTileRows = 12;
#elif defined(__AVX__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
// Weights packed at a time: 256 KB, for the second-level cache. One block's column of them, 32 KB, is for the first level.
constexpr int64_t kPanelInputs = 256, kPanelOutputs = 256;
// Rows of x that meet a panel before it is packed anew; their sums take 512 KB.
constexpr int64_t kPanelRows = 512;
#ifndef DB_CHAIN
#define DB_CHAIN 64
#endif
constexpr int64_t kChainInputs = DB_CHAIN;
constexpr int64_t kOperationsPerThread = 1 << 20;

template <class T>
struct Epilogue {
  float* sums;  // [rows of the tile][kPanelOutputs], in the order of load_pair
  bool first, last;
  const T* bias;
  T* y;
  int64_t y_stride, width;  // width: outputs in this block
};

// M rows of x by one block of outputs. x: [inputs][M], weight: [inputs][kBlock], both packed. Meanwhile the weights of the
// next panel are fetched: T's share of a block for each input.
template <class T, int M>
void multiply_tile(const float* x, const float* weight, int64_t inputs, const T* ahead, int64_t ahead_stride,
                   const Epilogue<T>& end) {
  Pair sums[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sums[m] = Pair{};
  for (int64_t i = 0; i < inputs; ++i) {
    Pair w = {load(weight), load(weight + kLanes)};
    for (int64_t byte = 0; byte < (int64_t)(kBlock * sizeof(T)); byte += 64)
      __builtin_prefetch((const char*)ahead + byte, 0, 2);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      sums[m].a += w.a * x[m];
      sums[m].b += w.b * x[m];
    }
    weight += kBlock;
    x += M;
    ahead += ahead_stride;
  }
  Pair bias = {};
  if (end.last && end.bias)
    bias = end.width == kBlock ? load_pair(end.bias) : load_pair_part(end.bias, end.width);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    float* partial = end.sums + m * kPanelOutputs;
    Pair sum = sums[m];
    if (!end.first) sum = {load(partial) + sum.a, load(partial + kLanes) + sum.b};
    if (!end.last) {
      store(partial, sum.a);
      store(partial + kLanes, sum.b);
      continue;
    }
    sum = {sum.a + bias.a, sum.b + bias.b};
    T* y = end.y + m * end.y_stride;
    if (end.width == kBlock)
      store_pair(y, sum);
    else
      store_pair_part(y, sum, end.width);
  }
}

template <class T, int M = kTileRows>
void multiply_rows(int64_t rows, const float* x, const float* weight, int64_t inputs, const T* ahead,
                   int64_t ahead_stride, const Epilogue<T>& end) {
  if constexpr (M > 1)
    if (rows < M) return multiply_rows<T, M - 1>(rows, x, weight, inputs, ahead, ahead_stride, end);
  multiply_tile<T, M>(x, weight, inputs, ahead, ahead_stride, end);
}

// To [block of outputs][inputs][kBlock], with zeros beyond the last output.
template <class T>
void pack_panel(const T* weight, int64_t weight_stride, int64_t inputs, int64_t outputs, float* packed) {
  for (int64_t i = 0; i < inputs; ++i) {
    const T* row = weight + i * weight_stride;
    float* to = packed + i * kBlock;
    int64_t o = 0;
    for (; o + kBlock <= outputs; o += kBlock, to += inputs * kBlock) {
      Pair w = load_pair(row + o);
      store(to, w.a);
      store(to + kLanes, w.b);
    }
    if (o < outputs) {
      Pair w = load_pair_part(row + o, outputs - o);
      store(to, w.a);
      store(to + kLanes, w.b);
    }
  }
}

// Tiles of rows differ by one row at most: 16 rows are 8 and 8, not 14 and 2.
DEADBAND_INLINE Range tile_rows(int64_t rows, int64_t tile) {
  return share(rows, 1, (int)tile, (int)((rows + kTileRows - 1) / kTileRows));
}

// To [panel of inputs][tile of rows][inputs][rows of the tile].
template <class T>
void pack_rows(const T* x, int64_t rows, int64_t x_stride, int64_t in, Range inputs, float* packed) {
  for (int64_t first = inputs.begin; first < inputs.end; first += kPanelInputs) {
    int64_t depth = min_of(kPanelInputs, in - first);
    float* to = packed + first * rows;
    for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
      Range mine = tile_rows(rows, tile);
      int64_t count = mine.end - mine.begin;
      // Some entries of a row at a time: a stride of a power of two maps one entry of every row to the same cache set.
      for (int64_t i = 0; i < depth; i += 32, to += 32 * count)
        for (int64_t r = 0; r < count; ++r) {
          const T* from = x + (mine.begin + r) * x_stride + first + i;
          for (int64_t k = 0; k < min_of(32, depth - i); ++k) to[k * count + r] = to_float(from[k]);
        }
      to = packed + first * rows + mine.end * depth;
    }
  }
}

template <class T>
void multiply_panels(const float* x, int64_t rows, int64_t in, const T* weight, int64_t weight_stride, Range outputs,
                     const T* bias, T* y, int64_t y_stride, float* packed, float* sums) {
  for (int64_t o = outputs.begin; o < outputs.end; o += kPanelOutputs) {
    int64_t width = min_of(kPanelOutputs, outputs.end - o);
    int64_t first = 0;
    do {  // once even without inputs: y is the bias then
      int64_t depth = min_of(kPanelInputs, in - first), next = first + depth;
      pack_panel(weight + first * weight_stride + o, weight_stride, depth, width, packed);
      for (int64_t block = 0; block < width; block += kBlock) {
        const T* ahead = weight + o + block;
        if (next + depth <= in)
          ahead += next * weight_stride;
        else if (o + kPanelOutputs + block < outputs.end)
          ahead += kPanelOutputs;
        Epilogue<T> end = {nullptr, false, false, bias ? bias + o + block : nullptr, nullptr, y_stride,
                           min_of(kBlock, width - block)};
        int64_t i = 0;
        do {
          int64_t chain = min_of(kChainInputs, depth - i);
          end.first = first + i == 0;
          end.last = first + i + chain == in;
          for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
            Range mine = tile_rows(rows, tile);
            int64_t count = mine.end - mine.begin;
            end.sums = sums + mine.begin * kPanelOutputs + block;
            end.y = y + mine.begin * y_stride + o + block;
            multiply_rows<T>(count, x + first * rows + mine.begin * depth + i * count,
                             packed + block * depth + i * kBlock, chain, ahead + i * weight_stride,
                             tile ? 0 : weight_stride, end);
          }
          i += chain;
        } while (i < depth);
      }
      first = next;
    } while (first < in);
  }
}

template <class T>
int gemm_typed(const T* x, int64_t rows, int64_t x_stride, int64_t in, const T* weight, int64_t weight_stride,
               int64_t out, const T* bias, T* y, int threads) {
  int64_t at_once = min_of(rows, kPanelRows);
  float* packed_x = (float*)workspace(kSharedSlot, at_once * in * sizeof(float));
  if (!packed_x) return DEADBAND_NO_MEMORY;
  threads = (int)min_of(threads, 1 + rows * in * out / kOperationsPerThread);
  int error = 0;
  for (int64_t r = 0; r < rows; r += kPanelRows) {
    int64_t count = min_of(kPanelRows, rows - r);
    parallel(threads, [&](int part, int parts) {
      pack_rows(x + r * x_stride, count, x_stride, in, share(in, kPanelInputs, part, parts), packed_x);
    });
    parallel(threads, [&](int part, int parts) {
      float* own = (float*)workspace(kPrivateSlot, kPanelOutputs * (kPanelInputs + count) * sizeof(float));
      if (own)
        multiply_panels(packed_x, count, in, weight, weight_stride, share(out, kBlock, part, parts), bias, y + r * out,
                        out, own, own + kPanelOutputs * kPanelInputs);
      else
        __atomic_store_n(&error, (int)DEADBAND_NO_MEMORY, __ATOMIC_RELAXED);
    });
  }
  return error;
}

int gemm(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
         int64_t weight_stride, int64_t out, const void* bias, void* y, int threads) {
  if (dtype == DEADBAND_FLOAT32)
    return gemm_typed((const float*)x, rows, x_stride, in, (const float*)weight, weight_stride, out,
                      (const float*)bias, (float*)y, threads);
  return gemm_typed((const bf16*)x, rows, x_stride, in, (const bf16*)weight, weight_stride, out, (const bf16*)bias,
                    (bf16*)y, threads);
}
